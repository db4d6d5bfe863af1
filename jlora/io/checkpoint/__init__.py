"""Checkpoints: adapters and the state of their training, saved with Orbax.

A checkpoint is a folder with two items:

    arrays/          every array by name, as Orbax writes it: zarr 2 or 3, in an OCDBT database or in plain files
    jlora/metadata   JSON: methods, roles and scales; shape, dtype and checksums of every array; the base; versions

`orbax` has the public functions, `metadata` the JSON and its formats. `storage`, `reader` and `buffers` read the
arrays, `checksums` verifies them, `placement` specifies where they go. `train_state` divides a state into arrays and
plain values, `fingerprint` compares a base with the recorded one. `errors` imports nothing, so that the error can be
caught before Orbax is imported.
"""
