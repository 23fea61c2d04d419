"""What a run looks like: charts, and one page that holds them with the tables and examples."""
