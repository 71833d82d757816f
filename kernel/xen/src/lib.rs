//! The guest side of Xen.
#![no_std]
