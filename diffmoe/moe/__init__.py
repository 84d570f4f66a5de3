"""Mixture of experts: routers decide (`routing`), the expert bank computes (`experts`)."""
