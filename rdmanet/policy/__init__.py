"""Who may talk to whom: Kubernetes' NetworkPolicy, compiled into what the datapath's map and the broker ask."""
