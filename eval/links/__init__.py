"""How soon is the first token there, over a real link of limited rate?"""
