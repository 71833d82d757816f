//! The backend in its model: one program for all of its tests, as each would bring the model along.
//! One subject is run by `cargo test -p pciback --test backend SUBJECT::`.

mod model;

mod aer;
mod cases;
mod choreography;
mod delegated;
mod dumps;
mod fuzz;
mod hostile;
mod images;
mod interrupts;
mod life_cycle;
mod long_run;
mod modes;
mod msix_state;
mod power;
mod protocol;
mod quirks;
mod races;
mod reset_choice;
mod reset_images;
mod resets;
mod security;
mod sequences;
mod siblings;
mod topology;
mod virtual_functions;
mod without_msix;
