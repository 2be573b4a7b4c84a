"""Models at remote paths: any URL that fsspec reads.

A URL stands for a local folder of the same files: small ones are copied, weights are empty stand-ins whose bytes are
read over the network, range by range, when they are asked for. fsspec is imported when a URL is first used.
"""
