"""Rollouts on servers: requests and answers of two contracts, weights that are pushed, and a server of our own."""
