"""Kubernetes objects that people give the node: values, reading them from documents, keeping them."""
