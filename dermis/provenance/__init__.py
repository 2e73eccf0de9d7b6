"""Who made a file: signatures of bundles and datasets (`signing`), and signed metadata of images (`c2pa`).

`dermis.image_metadata` is the unsigned part, which every image has. The packages that sign are an extra (`dermis[provenance]`).
"""
