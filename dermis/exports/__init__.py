"""Finished datasets in the formats of other tools: DICOM, COCO, YOLO, FiftyOne, and Croissant with date and address."""
