//! What PostgreSQL defines: control file, pages, WAL names, labels, exclusions. No I/O.
