"""The former name of `launcher.cluster.job`. Scripts of jobs that are already queued call it."""

from launcher.cluster.job import main

if __name__ == "__main__":
    main()
