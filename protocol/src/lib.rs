//! What crosses the wire between two Twinbox nodes. Sans-I/O: no sockets, no clock, no files.
