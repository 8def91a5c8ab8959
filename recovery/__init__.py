"""Membership, commits and the remedies that bring lost state back."""
