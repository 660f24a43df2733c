from kvzip.cli import main

main()
