//! What a node remembers, and how two memories are reconciled.
