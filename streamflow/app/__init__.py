"""Programs on top of the library: the command line, the configuration, the server, the doctor."""
