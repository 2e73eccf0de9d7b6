"""Read official StyleGAN2-ADA (PyTorch) checkpoints without executing anything in them.

isolation.py  the process that reads a file, with limits of time and memory
foreign.py    recognises files that are not checkpoints
pickled.py    reads a pickle as data: plain values, and records of the calls that it requests
source.py     checks the embedded Python source without running it
persisted.py  the records as persisted objects and arrays
stored.py     the result of that process: JSON and safetensors
convert.py    `read_official`: configuration, cross-checks, networks
"""
