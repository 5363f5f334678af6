"""What is timed, against what; results lie in benchmarks/results/."""
