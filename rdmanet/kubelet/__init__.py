"""Kubelet: its protocols as values, the device plugin, and which slot a pod has."""
