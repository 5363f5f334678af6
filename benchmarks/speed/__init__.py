"""How fast it is: the MoE layer and whole models over dense ones and over peers, in one run. `python -m benchmarks.speed`, `make bench`."""
