"""Evaluates, applies and exports trained models."""
