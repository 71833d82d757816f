//! The rig: boots a real Xen in QEMU and runs scenarios in it.
