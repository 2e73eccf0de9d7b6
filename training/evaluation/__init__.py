"""Evaluation of a trained generator: numbers for its bundle, a page for people, a survey for experts."""
