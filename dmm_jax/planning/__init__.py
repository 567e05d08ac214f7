"""Memory, work and time of a run, before a machine is rented."""
