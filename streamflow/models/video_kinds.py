def not_streamed(cls):
    return cls.__name__
