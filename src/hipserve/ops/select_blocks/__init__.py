"""Which key blocks does each query block read? (arXiv 2406.09827, section 3)"""
