"""Start the ranks, on this machine or in a Slurm job. Imports no torch."""
