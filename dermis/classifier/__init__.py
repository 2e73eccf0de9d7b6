"""Classifiers: preparing images, checking a graph, and scoring with ONNX Runtime or torch."""
