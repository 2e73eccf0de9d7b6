"""The resources of a client, one module for each noun: its flows, its blocking and its asynchronous class."""
