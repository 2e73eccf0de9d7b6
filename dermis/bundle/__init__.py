"""The on-disk format of bundles: the folder that training writes and the service reads, verified as a whole.

    bundle.json               format, name, network configurations, class names, provenance, SHA-256 and size of every file
    generator.safetensors     weights under the official StyleGAN2-ADA key names, stored as float32 or float16
    discriminator.safetensors optional, for transfer learning
    classifier/               optional: a classifier (`dermis.bundle.classifier`)
    encoder/                  optional: an encoder from images to latents, for projections (`dermis.bundle.encoder`)
    authenticity/             optional: an index of the training images' embeddings (`dermis.bundle.index`)
    reference/                optional: statistics of real images, for reports (`dermis.bundle.reference`)
    copies/                   optional: a detector of changed copies of training images (`dermis.bundle.copies`)
    directions.safetensors    optional: named directions of w (`dermis.bundle.directions`)
    metrics.json              measurements of the generator; an empty object if there are none
    privacy_audit.json        optional: result of a privacy audit (`dermis.privacy.audit`)
    MODEL_CARD.md             the model card, and the pictures that it shows
    model.sig                 optional: a signature of all files (`dermis.provenance.signing`)

The SHA-256 of bundle.json identifies the bundle: bundle.json contains the hashes of all other files. Nothing in a bundle
is unpickled or executed, and files that it does not list are not read: a bundle can be untrusted. `docs/bundles.md`
documents the format.

This package describes files. The packages that run them (`dermis.classifier`, `dermis.authenticity`, `dermis.projection`,
`dermis.directions`) import it, and it imports none of them.
"""

from __future__ import annotations

from dermis.bundle.bundle import (
    BUNDLE_FORMAT,
    CARD,
    GENERATOR,
    METRICS,
    SIGNATURE,
    Bundle,
    amend_bundle,
    check_names,
    find_part,
    has_part,
    load_discriminator,
    load_generator,
    open_bundle,
    read_signature,
    trained_on,
    write_bundle,
)
from dermis.bundle.installed import DESCRIPTOR

__all__ = [
    "BUNDLE_FORMAT",
    "CARD",
    "DESCRIPTOR",
    "GENERATOR",
    "METRICS",
    "SIGNATURE",
    "Bundle",
    "amend_bundle",
    "check_names",
    "find_part",
    "has_part",
    "load_discriminator",
    "load_generator",
    "open_bundle",
    "read_signature",
    "trained_on",
    "write_bundle",
]
