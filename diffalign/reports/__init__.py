"""From judged rows to summaries, tables, pages and plots."""
