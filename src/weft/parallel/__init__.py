"""Ranks: process groups, collectives, and the way a plan reaches every rank."""
