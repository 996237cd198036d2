"""TLI Lab: where inside a language model do two languages meet, and can a small adapter bring them together?"""
