"""Official StyleGAN2-ADA (PyTorch) checkpoints, read without executing anything in them.

isolation.py  the process that reads a file, with limits of time and memory
foreign.py    recognises files that are no checkpoints
pickled.py    a pickle as data: plain values, and records of the calls that it asks for
source.py     a static look at the embedded Python source
persisted.py  the records as persisted objects and arrays
stored.py     the result of that process: JSON and safetensors
convert.py    `read_official`: configuration, cross-checks, networks
"""
