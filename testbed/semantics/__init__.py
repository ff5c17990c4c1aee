"""Kubernetes' semantics of policies and services as plain Python, written from its documentation alone.

What the datapath does is compared with this; so nothing here knows how the datapath does it, and nothing is fast.
"""
