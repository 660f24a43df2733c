"""What does it cost, and does it pay?"""
