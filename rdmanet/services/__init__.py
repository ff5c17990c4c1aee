"""Services: from Kubernetes' objects to what the programs look up."""
