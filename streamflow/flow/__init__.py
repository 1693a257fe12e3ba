"""The mathematics of a flow: its convention, schedules, solvers, guidance and noise. Tensors only."""
