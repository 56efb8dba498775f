"""Benchmarks of regkern beside its peers, in one process and in alternating rounds. See README.md in this folder."""
