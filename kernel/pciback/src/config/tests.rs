//! Tests of the virtual configuration space against a model of a device.
//! Numbered cases are real passthrough problems; their values come from listings of real devices.

use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;
use std::{println, string::String};

use super::*;

/// A device: its bytes, which of their bits take a write, and which are cleared by writing 1.
#[derive(Clone)]
struct Model {
    bytes: Vec<u8>,
    writable_bits: Vec<u8>,
    clear_bits: Vec<u8>,
    log: Vec<(u16, Width, u32)>,
    writes_on: bool,
}

const PM: u16 = 0x40;
const MSI: u16 = 0x50;
const MSIX: u16 = 0x70;
const VPD: u16 = 0x80;
const VENDOR_SPECIFIC: u16 = 0x90;

impl Model {
    fn empty() -> Model {
        Model {
            bytes: vec![0; 4096],
            writable_bits: vec![0; 4096],
            clear_bits: vec![0; 4096],
            log: Vec::new(),
            writes_on: true,
        }
    }

    /// A NIC with 64-bit memory in BAR 0, I/O in BAR 2, and PM, MSI (64-bit), MSI-X, VPD and a
    /// vendor's own capability.
    fn nic() -> Model {
        let mut model = Model::empty();
        model.put(0x00, &[0x86, 0x80, 0x21, 0x15, 0x03, 0x04, 0x10, 0x00, 1, 0, 0, 2, 0x10, 0x20, 0x80, 0x80]);
        model.put(0x10, &[0x04, 0x00, 0x00, 0xfe, 0x01, 0x00, 0x00, 0x00, 0x01, 0xe0, 0x00, 0x00]);
        model.put(0x34, &[0x40]);
        model.put(0x3c, &[0x0b, 0x01]);
        model.put(PM, &[0x01, 0x50, 0x23, 0xc8, 0x00, 0x01, 0x55, 0x66]);
        model.put(MSI, &[0x05, 0x70, 0x80, 0x00]);
        model.put(MSIX, &[0x11, 0x80, 0x09, 0x00, 0x03, 0x00, 0x00, 0x00, 0x03, 0x20, 0x00, 0x00]);
        model.put(VPD, &[0x03, 0x90, 0x00, 0x00]);
        model.put(VENDOR_SPECIFIC, &[0x09, 0x00, 0x10, 0x00]);
        // What a device takes, and more: that nothing wrong is written has to show.
        model.writable_bits[0x04..0x06].fill(0xff);
        model.clear_bits[0x06..0x08].copy_from_slice(&[0x00, 0xf9]);
        model.writable_bits[0x0c..0x0e].fill(0xff);
        model.writable_bits[0x0f] = 0x40;
        model.writable_bits[0x10..0x28].fill(0xff);
        model.writable_bits[0x30..0x34].fill(0xff);
        model.writable_bits[0x3c] = 0xff;
        model.writable_bits[0x40..0x1000].fill(0xff);
        model.clear_bits[usize::from(PM) + 5] = 0x80;
        model.writable_bits[usize::from(PM) + 5] = 0x7f;
        model
    }

    fn nic_view() -> GuestView {
        let mut resources = [Resource::default(); 7];
        resources[0] = Resource { start: 0x1_fe00_0000, end: 0x1_fe00_3fff, flags: 0x14_0204 };
        resources[2] = Resource { start: 0xe000, end: 0xe01f, flags: 0x4_0101 };
        GuestView { pirq: 17, resources, permissive: false, multifunction: false }
    }

    fn put(&mut self, at: u16, bytes: &[u8]) {
        self.bytes[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    }

    fn word(&self, at: u16) -> u16 {
        self.read(at, Width::Word) as u16
    }
}

impl ConfigSpace for Model {
    fn read(&self, offset: u16, width: Width) -> u32 {
        assert!(offset.is_multiple_of(width.bytes()) && offset < 4096, "the caller checks the access");
        let mut value = 0;
        for byte in (0..width.bytes()).rev() {
            value = value << 8 | u32::from(self.bytes[usize::from(offset + byte)]);
        }
        value
    }

    fn write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), WritesOff> {
        assert!(offset.is_multiple_of(width.bytes()) && offset < 4096, "the caller checks the access");
        assert!(value & !width.mask() == 0, "no bits above the width");
        if !self.writes_on {
            return Err(WritesOff);
        }
        self.log.push((offset, width, value));
        for (at, byte) in (usize::from(offset)..).zip(value.to_le_bytes()).take(usize::from(width.bytes())) {
            let (held, takes) = (self.bytes[at], self.writable_bits[at]);
            self.bytes[at] = (held & !takes | byte & takes) & !(byte & self.clear_bits[at]);
        }
        Ok(())
    }

    fn writable(&self) -> bool {
        self.writes_on
    }

    fn allow_writes(&mut self, _: crate::platform::Way) {
        self.writes_on = true;
    }
}

/// A device and its virtual configuration space, with a guest.
struct Bench {
    hardware: Model,
    config: VirtualConfig,
}

impl Bench {
    fn new(mut hardware: Model, view: GuestView) -> Bench {
        let mut config = VirtualConfig::new(&hardware, None).expect("seized");
        config.attach(&mut hardware, view).expect("attached");
        hardware.log.clear();
        Bench { hardware, config }
    }

    fn nic() -> Bench {
        Bench::new(Model::nic(), Model::nic_view())
    }

    fn permissive_nic() -> Bench {
        Bench::new(Model::nic(), GuestView { permissive: true, ..Model::nic_view() })
    }

    fn writes_off() -> Bench {
        let mut bench = Bench::nic();
        bench.hardware.writes_on = false;
        bench
    }

    fn read(&mut self, offset: u16, size: i32) -> u32 {
        self.config.read(&self.hardware, i32::from(offset), size).expect("a valid access")
    }

    fn write(&mut self, offset: u16, size: i32, value: u32) -> Written {
        self.config.write(&mut self.hardware, i32::from(offset), size, value).expect("a valid access")
    }
}

const DROPPED: Written = Written::Dropped { first: true };
const DENIED: Written = Written::Denied { first: true };

fn assert_covers_all(config: &VirtualConfig) {
    let mut next = 0;
    for register in config.registers() {
        assert_eq!(register.offset, next, "{register:?}");
        assert!(register.length > 0, "{register:?}");
        next = register.end();
    }
    assert_eq!(next, 4096);
}

fn name_at(config: &VirtualConfig, at: u16) -> Name {
    config.registers().find(|register| (register.offset..register.end()).contains(&at)).expect("covered").name
}

#[test]
fn the_table_covers_every_byte_once() {
    let config = VirtualConfig::new(&Model::nic(), None).expect("seized");
    assert_covers_all(&config);
    assert_eq!(name_at(&config, PM + 4), Name::PowerControl);
    assert_eq!(name_at(&config, MSI + 0xd), Name::MsiMessage);
    assert_eq!(name_at(&config, MSI + 0xe), Name::Raw);
    assert_eq!(name_at(&config, MSIX + 0xb), Name::MsixLocation);
    assert_eq!(name_at(&config, VPD + 4), Name::VpdData);
    assert_eq!(name_at(&config, VENDOR_SPECIFIC), Name::CapabilityHeader { id: 9, next: 0 });
    assert_eq!(name_at(&config, 0x100), Name::Raw);
}

/// A capability whose registers would end behind the list's space or lie on the next one's is in no list: rules for its
/// registers would be rules for others'.
#[test]
fn a_capability_whose_registers_cannot_lie_where_it_says_is_hidden() {
    const SHORT: [u8; 2] = [0x09, 0x00];
    // Id, bytes it needs, what makes it need them.
    for (id, needs, control) in [
        (0x01, 8, 0),
        (0x03, 8, 0),
        (0x05, 10, 0),
        (0x05, 14, 0x80),
        (0x05, 20, 0x100),
        (0x05, 24, 0x180),
        (0x11, 12, 0),
        (0x10, 20, 2),
        (0x13, 6, 0),
    ] {
        for (at, next) in [
            (0x60, 0x60 + ((needs + 3) & !3)),
            (0x60, 0x60 + ((needs - 1) & !3)),
            (0x100 - ((needs + 3) & !3), 0),
            (0x100 - ((needs - 1) & !3), 0),
        ] {
            let mut model = Model::nic();
            model.bytes[0x40..0x100].fill(0);
            model.put(0x34, &[0x40]);
            model.put(0x40, &[SHORT[0], at as u8]);
            model.put(
                at,
                &[id, next as u8, control as u8, (control >> 8) as u8, 0, 0, 0, 0, 3, 0x20, 0, 0]
                    [..12.min(0x100 - usize::from(at))],
            );
            if next != 0 {
                model.put(next, &SHORT);
            }
            let config = VirtualConfig::new(&model, None).expect("seized");
            assert_covers_all(&config);
            let fits = if next == 0 { at + needs <= 0x100 } else { at + needs <= next };
            assert_eq!(config.capability(id).is_some(), fits, "{id:#x} of {needs} bytes at {at:#x}, next {next:#x}");
            assert_eq!(config.hidden().any(|hidden| hidden == (id, at)), !fits);
            let mut bench = Bench::new(model, Model::nic_view());
            assert_eq!(bench.read(0x41, 1), if fits { u32::from(at) } else { 0 }, "the list goes around it");
            if !fits {
                assert_eq!(bench.read(at, 4), 0);
            }
        }
    }
}

#[test]
fn a_capability_list_that_loops_overlaps_or_points_nowhere_still_gives_a_table() {
    let lists: [&[(u16, u8, u8)]; 8] = [
        &[(0x34, 0x40, 0), (0x40, 0x01, 0x40)],
        &[(0x34, 0x40, 0), (0x40, 0x01, 0x50), (0x50, 0x05, 0x40)],
        &[(0x34, 0x40, 0), (0x40, 0x05, 0x44), (0x44, 0x01, 0x48), (0x48, 0x11, 0x4c), (0x4c, 0x03, 0)],
        &[(0x34, 0x10, 0), (0x10, 0x05, 0x40)],
        &[(0x34, 0xff, 0), (0xfc, 0x11, 0x03)],
        &[(0x34, 0xf8, 0), (0xf8, 0x05, 0x3c)],
        &[(0x34, 0x43, 0), (0x40, 0x03, 0x51), (0x50, 0xff, 0xff)],
        &[(0x34, 0x00, 0)],
    ];
    for list in lists {
        let mut model = Model::nic();
        model.bytes[0x40..0x100].fill(0);
        for (at, id, next) in list {
            model.put(*at, &[*id, *next][..if *at == 0x34 { 1 } else { 2 }]);
        }
        assert_covers_all(&VirtualConfig::new(&model, None).expect("seized"));
    }
}

#[test]
fn a_list_through_all_48_places_ends() {
    let mut model = Model::nic();
    for at in (0x40u16..0x100).step_by(4) {
        model.put(at, &[0x05, (at as u8).wrapping_add(4), 0x80, 0x01]);
    }
    let config = VirtualConfig::new(&model, None).expect("seized");
    assert_covers_all(&config);
    assert_eq!(config.hidden().count(), 48, "all lie on each other");
}

#[test]
fn garbage_in_the_whole_space_gives_a_table() {
    let mut random = Random(7);
    for _ in 0..500 {
        let mut model = Model::empty();
        model.bytes.fill_with(|| random.next() as u8);
        model.bytes[0x0e] &= 0x80;
        model.bytes[0x00] = 0x86;
        model.bytes[0x06] |= 0x10;
        assert_covers_all(&VirtualConfig::new(&model, None).expect("seized"));
    }
}

/// With rules for both, a power state written by the guest would become MSI data (XSA-128).
#[test]
fn two_capabilities_that_lie_on_each_other_are_both_hidden() {
    let mut model = Model::nic();
    model.put(0x40, &[0x05, 0x48, 0x80, 0x00]);
    model.put(0x48, &[0x01, 0x90]);
    let mut bench = Bench::new(model, GuestView { permissive: true, ..Model::nic_view() });
    assert_covers_all(&bench.config);
    assert_eq!(bench.config.hidden().collect::<Vec<_>>(), [(0x05, 0x40), (0x01, 0x48)]);
    assert_eq!(bench.read(0x34, 1), 0x90, "the list goes around them");
    for at in (0x40..0x50).step_by(4) {
        bench.write(at, 4, u32::MAX);
        assert_eq!(bench.read(at, 4), 0);
    }
    assert_eq!(bench.hardware.log, []);
}

#[test]
fn case_21_a_write_to_the_msi_header_and_control_changes_neither() {
    for mut bench in [Bench::nic(), Bench::permissive_nic()] {
        assert_eq!(bench.write(MSI, 4, 0x0001_0009), DENIED);
        assert_eq!(bench.write(MSI, 4, 0x0081_0005), Written::Denied { first: false });
        assert!(bench.hardware.log.is_empty());
        assert_eq!(bench.read(MSI, 4), 0x0080_7005);
        assert_eq!(bench.write(MSI, 4, 0x0080_7005), Written::Done);
    }
}

#[test]
fn case_21_msi_data_and_its_neighbours_stay() {
    let mut bench = Bench::nic();
    assert_eq!(bench.write(MSI + 0xd, 1, 0xff), DROPPED);
    assert_eq!(bench.write(MSI + 4, 4, 0xfee0_0000), Written::Dropped { first: false });
    assert!(bench.hardware.log.is_empty());

    let mut model = Model::nic();
    model.put(MSI + 2, &[0x00]);
    let mut bench = Bench::new(model, GuestView { permissive: true, ..Model::nic_view() });
    assert_eq!(bench.write(MSI + 8, 4, 0xaabb_ccdd), DROPPED);
    assert_eq!(bench.hardware.word(MSI + 8), 0);
    // The two bytes behind the 32-bit capability are nobody's, and this guest is permissive.
    assert_eq!(bench.hardware.log, [(MSI + 10, Width::Word, 0xaabb)]);
}

#[test]
fn case_21_and_reference_item_2_accesses_no_device_answers_touch_nothing() {
    let mut bench = Bench::permissive_nic();
    let bad = [
        (0x06, 4),
        (0xfe, 4),
        (0x05, 2),
        (0, 0),
        (0, 3),
        (0, 8),
        (0, -1),
        (-1, 1),
        (-4, 4),
        (0x1000, 1),
        (0x1000, 4),
        (0xfff, 2),
        (0x10000, 4),
        (i32::MIN, 4),
        (i32::MAX, 1),
        (0, i32::MIN),
    ];
    for (offset, size) in bad {
        let Bench { hardware, config } = &mut bench;
        assert_eq!(config.read(hardware, offset, size), Err(WireError::InvalidOffset), "{offset:#x} {size}");
        assert_eq!(config.write(hardware, offset, size, 0), Err(WireError::InvalidOffset), "{offset:#x} {size}");
    }
    assert!(bench.hardware.log.is_empty());
    bench.read(0xffc, 4);
    bench.read(0xfff, 1);
}

#[test]
fn case_21_a_dword_at_3c_writes_nothing() {
    for mut bench in [Bench::nic(), Bench::permissive_nic()] {
        assert_eq!(bench.write(0x3c, 4, 0xffff_ffff), DROPPED);
        assert!(bench.hardware.log.is_empty());
        assert_eq!(bench.read(0x3c, 4), 0x0000_0111);
        assert_eq!(bench.write(0x3c, 1, 5), Written::Done);
        assert_eq!(bench.read(0x3c, 1), 17);
    }
}

#[test]
fn the_rest_of_a_write_over_several_registers_is_not_lost() {
    // The reference drops the Status half of this write, permissive or not.
    let mut bench = Bench::permissive_nic();
    bench.hardware.bytes[0x07] = 0xf9;
    assert_eq!(bench.write(0x04, 4, 0xf900_0407), Written::Done);
    assert_eq!(bench.hardware.bytes[0x07], 0);
    assert_eq!(bench.hardware.word(4), 0x0407);

    let mut bench = Bench::permissive_nic();
    bench.write(MSIX + 0xc, 4, 0x1122_3344);
    assert_eq!(bench.hardware.log, [(MSIX + 0xc, Width::Dword, 0x1122_3344)]);
    // Behind the vendor's header, 3 bytes of which the first is odd do not occur: words and bytes.
    bench.hardware.log.clear();
    assert_eq!(bench.write(VENDOR_SPECIFIC, 4, 0xbeef_0009), Written::Done);
    assert_eq!(bench.hardware.log, [(VENDOR_SPECIFIC + 2, Width::Word, 0xbeef)]);
}

#[test]
fn case_22_a_write_nobody_knows_is_dropped_and_told_once() {
    let mut bench = Bench::nic();
    assert_eq!(bench.write(0xe0, 2, 0x1234), DROPPED);
    assert_eq!(bench.write(0xe0, 2, 0x1234), Written::Dropped { first: false });
    assert_eq!(bench.write(0xe2, 2, 0x1234), Written::Dropped { first: false });
    assert_eq!(DROPPED.answer(), Ok(()));
    assert!(bench.hardware.log.is_empty());
    assert_eq!(bench.read(0xe0, 2), 0);
}

#[test]
fn case_23_a_write_to_acs_control_in_extended_space_has_no_effect() {
    let mut bench = Bench::nic();
    assert_eq!(bench.write(0x1d6, 2, 0x1d), DROPPED);
    assert!(bench.hardware.log.is_empty());
    assert_eq!(bench.write(0x04, 2, 0x0007), Written::Done);
    assert_eq!(bench.hardware.word(4), 0x0007);
}

#[test]
fn case_23_extended_space_of_a_device_without_it_reads_as_the_hardware_answers() {
    let mut model = Model::nic();
    model.bytes[0x100..].fill(0xff);
    let mut bench = Bench::new(model, Model::nic_view());
    for offset in (0x100..0x1000).step_by(4) {
        assert_eq!(bench.read(offset, 4), 0xffff_ffff);
    }
}

#[test]
fn case_24_permissive_is_one_guests_and_ends_with_it() {
    let mut bench = Bench::permissive_nic();
    assert_eq!(bench.write(0xe0, 2, 0x1234), Written::Done);
    assert_eq!(bench.hardware.word(0xe0), 0x1234);
    bench.config.detach(&mut bench.hardware);
    bench.config.attach(&mut bench.hardware, Model::nic_view()).expect("attached");
    assert_eq!(bench.write(0xe0, 2, 0x4321), DROPPED);
    assert_eq!(bench.hardware.word(0xe0), 0x1234);
}

#[test]
fn case_24_permissive_does_not_move_bars_or_switch_msi() {
    let mut bench = Bench::permissive_nic();
    assert_eq!(bench.write(0x10, 4, 0xd000_0000), DROPPED);
    assert_eq!(bench.write(MSI + 2, 2, 0x0081), DENIED);
    assert_eq!(bench.write(MSIX + 2, 2, 0xc009), Written::Denied { first: false });
    assert_eq!(DENIED.answer(), Err(WireError::AccessDenied));
    bench.write(MSIX + 4, 4, 0xffff_ffff);
    bench.write(MSI + 4, 4, 0xfee0_0000);
    assert!(bench.hardware.log.is_empty());
    assert_eq!(bench.write(MSIX + 2, 2, 0x0009), Written::Done);
}

#[test]
fn case_26_every_width_reads_its_slice_of_the_same_bytes() {
    let mut bench = Bench::nic();
    bench.write(0x04, 2, 0x0547);
    bench.write(0x10, 4, 0xffff_ffff);
    bench.write(0x18, 4, 0xffff_ffff);
    for offset in 0..0x1000 {
        let byte = bench.read(offset, 1);
        assert!(byte <= 0xff);
        if offset % 2 == 0 {
            let word = bench.read(offset, 2);
            assert!(word <= 0xffff);
            assert_eq!(word, byte | bench.read(offset + 1, 1) << 8, "{offset:#x}");
        }
        if offset % 4 == 0 {
            assert_eq!(bench.read(offset, 4), bench.read(offset, 2) | bench.read(offset + 2, 2) << 16, "{offset:#x}");
        }
    }
}

#[test]
fn case_26_a_byte_walk_of_the_capability_list_reads_bytes() {
    let mut model = Model::nic();
    model.put(0x34, &[0x60]);
    model.put(0x60, &[0x01, 0x68, 0x03, 0x00]);
    model.put(0x68, &[0x05, 0x78, 0x80, 0x00]);
    let mut bench = Bench::new(model, Model::nic_view());
    let walk = [0x06, 0x34, 0x60, 0x61, 0x68].map(|at| bench.read(at, 1));
    assert_eq!(walk, [0x10, 0x60, 0x01, 0x68, 0x05]);
}

#[test]
fn case_29_a_guest_reads_decoding_as_it_wrote_it_and_the_device_keeps_it() {
    for mut bench in [Bench::nic(), Bench::permissive_nic()] {
        assert_eq!(bench.write(0x04, 2, 0x0007), Written::Done);
        assert_eq!(bench.hardware.word(4), 0x0007);
        for (size, value) in [(2, 0), (1, 0), (4, 0)] {
            bench.write(0x04, 2, 0x0007);
            let written = bench.write(0x04, size, value);
            assert!(written.answer().is_ok());
            assert_eq!(bench.read(0x04, 2), 0x0000);
            assert_eq!(bench.hardware.word(4), 0x0003, "decoding stays, bus mastering follows");
        }
    }
}

#[test]
fn case_29_parity_and_serr_are_the_guests_notepad() {
    for mut bench in [Bench::nic(), Bench::permissive_nic()] {
        bench.write(0x04, 2, 0x0142);
        assert_eq!(bench.read(0x04, 2), 0x0142);
        assert_eq!(bench.hardware.word(4) & 0x0140, 0);
    }
}

#[test]
fn decoding_goes_on_only_where_the_function_has_addresses() {
    let mut model = Model::nic();
    model.put(0x04, &[0, 0]);
    model.put(0x18, &[0, 0]);
    let mut view = Model::nic_view();
    view.resources[2] = Resource::default();
    let mut bench = Bench::new(model, view);
    assert_eq!(bench.write(0x04, 2, 0x0003), Written::Done);
    assert_eq!(bench.hardware.word(4), 0x0002);
    assert_eq!(bench.read(0x04, 2), 0x0003);
}

#[test]
fn interrupt_disable_follows_a_guest_that_has_turned_on_decoding() {
    let mut bench = Bench::nic();
    assert_eq!(bench.hardware.word(4), 0x0403);
    bench.write(0x04, 2, 0x0004);
    assert_eq!(bench.hardware.word(4), 0x0407);
    bench.write(0x04, 2, 0x0006);
    assert_eq!(bench.hardware.word(4), 0x0007);
    bench.write(0x04, 2, 0x0406);
    assert_eq!(bench.hardware.word(4), 0x0407);
    assert_eq!(bench.read(0x04, 2), 0x0406);
    bench.write(0x05, 1, 0x00);
    assert_eq!((bench.hardware.word(4), bench.read(0x04, 2)), (0x0007, 0x0006));
    // Without decoding it stays as it was.
    bench.write(0x04, 2, 0x0404);
    assert_eq!((bench.hardware.word(4), bench.read(0x04, 2)), (0x0007, 0x0404));
    bench.write(0x04, 2, 0x0406);
    assert_eq!(bench.hardware.word(4), 0x0407);

    let mut without_pin = Model::nic();
    without_pin.put(0x3d, &[0]);
    let mut bench = Bench::new(without_pin, Model::nic_view());
    bench.write(0x04, 2, 0x0006);
    assert_eq!(bench.hardware.word(4), 0x0407);
}

#[test]
fn memory_write_and_invalidate_follows_and_the_other_bits_only_for_a_permissive_guest() {
    let mut bench = Bench::nic();
    bench.write(0x04, 2, 0x02be);
    assert_eq!(bench.hardware.word(4), 0x0017);
    assert_eq!(bench.read(0x04, 2), 0x0016);
    bench.write(0x04, 2, 0x0006);
    assert_eq!(bench.hardware.word(4), 0x0007);

    let mut bench = Bench::permissive_nic();
    bench.write(0x04, 2, 0xffff);
    assert_eq!(bench.hardware.word(4), 0x06bf);
    bench.write(0x04, 2, 0x0000);
    assert_eq!(bench.hardware.word(4), 0x0403);
}

#[test]
fn a_byte_write_to_command_keeps_the_other_byte() {
    let mut bench = Bench::nic();
    bench.write(0x04, 2, 0x0547);
    bench.write(0x05, 1, 0x00);
    assert_eq!(bench.read(0x04, 2), 0x0047 & !0x0040 | 0x0040 & 0x0147);
    bench.write(0x04, 1, 0x06);
    assert_eq!(bench.read(0x04, 2), 0x0006);
}

/// Sizes and restores every register that `view` shows; `resources` says what must be read.
fn size_all_bars(bench: &mut Bench, resources: &[Resource; 7]) {
    let before = bench.hardware.bytes.clone();
    bench.hardware.log.clear();
    let mut upper_of = None;
    for (index, resource) in resources.iter().enumerate() {
        let at = bars::register_offset(index);
        let shown = bench.read(at, 4);
        let all_ones = if index == 6 { 0xffff_f800 } else { 0xffff_ffff };
        assert_eq!(bench.write(at, 4, all_ones), Written::Done);
        let size = bench.read(at, 4);
        if let Some(low) = upper_of.take() {
            let low: &Resource = low;
            assert_eq!(shown, (low.start >> 32) as u32);
            assert_eq!(size, ((low.end - low.start + 1).wrapping_neg() >> 32) as u32);
        } else if resource.end == 0 {
            assert_eq!((shown, size), (0, 0), "BAR {index}");
        } else {
            let mask = if resource.flags & 0x100 != 0 { 0x3 } else { 0xf };
            assert_eq!(shown & !mask, resource.start as u32, "BAR {index}");
            assert_eq!(size & !mask, (resource.end - resource.start + 1).wrapping_neg() as u32, "BAR {index}");
            assert_eq!(size & mask, shown & mask, "BAR {index}");
            if index < 6 && resource.flags & 0x10_0000 != 0 {
                upper_of = Some(resource);
            }
        }
        assert_eq!(bench.write(at, 4, shown), Written::Done);
        assert_eq!(bench.read(at, 4), shown);
    }
    assert!(bench.hardware.log.is_empty(), "sizing needs no write: {:x?}", bench.hardware.log);
    assert!(bench.hardware.bytes == before);
}

fn view_of(text: &str) -> GuestView {
    let resources = Resource::parse_list(text).expect("a list");
    GuestView { pirq: 11, resources, permissive: false, multifunction: false }
}

#[test]
fn case_31_sas2008_io_then_two_64_bit_bars() {
    let mut model = Model::nic();
    model.put(0x10, &[0x01, 0xb0, 0, 0, 0x04, 0xc0, 0xff, 0xf9, 0, 0, 0, 0, 0x04, 0x00, 0xf8, 0xf9, 0, 0, 0, 0]);
    model.put(0x30, &[0x00, 0x00, 0xf0, 0xf9]);
    let view = view_of(
        "0xb000 0xb0ff 0x40101;0xf9ffc000 0xf9ffffff 0x140204;0x0 0x0 0x0;0xf9f80000 0xf9fbffff 0x140204;\
         0x0 0x0 0x0;0x0 0x0 0x0;0xf9f00000 0xf9f7ffff 0x46200",
    );
    let mut bench = Bench::new(model, view);
    size_all_bars(&mut bench, &view.resources);
    bench.write(0x14, 4, 0xffff_ffff);
    assert_eq!(bench.read(0x14, 4), 0xffff_c004);
    bench.write(0x18, 4, 0xffff_ffff);
    assert_eq!(bench.read(0x18, 4), 0xffff_ffff);
}

#[test]
fn case_31_rtl8168_the_upper_half_09_is_not_an_io_bar() {
    let mut model = Model::nic();
    model.put(0x10, &[0x01, 0x40, 0, 0, 0, 0, 0, 0, 0x04, 0x00, 0x70, 0x71, 0, 0, 0, 0]);
    model.put(0x20, &[0x0c, 0x00, 0x40, 0x00, 0x09, 0x00, 0x00, 0x00]);
    let view = view_of(
        "0x4000 0x40ff 0x40101;0x0 0x0 0x0;0x71700000 0x71700fff 0x140204;0x0 0x0 0x0;\
         0x900400000 0x900403fff 0x14220c;0x0 0x0 0x0;0x0 0x0 0x0",
    );
    let mut bench = Bench::new(model, view);
    size_all_bars(&mut bench, &view.resources);
    assert_eq!(bench.read(0x24, 4), 9);
    // All ones but for the bits an I/O register ignores: no sizing of an upper half.
    assert_eq!(bench.write(0x24, 4, 0xffff_fffc), DROPPED);
    assert_eq!(bench.read(0x24, 4), 9);
    bench.write(0x24, 4, 0xffff_ffff);
    assert_eq!(bench.read(0x24, 4), 0xffff_ffff);
    assert_eq!(bench.read(0x20, 4), 0x0040_000c, "its lower half is sized for itself");
}

#[test]
fn case_31_marvell_a_rom_register_of_ones_that_is_off_is_no_contradiction() {
    let mut model = Model::nic();
    model.put(0x30, &[0x00, 0x00, 0xff, 0xff]);
    let mut view = Model::nic_view();
    Bench::new(model.clone(), view);
    view.resources[6] = Resource { start: 0xdf40_0000, end: 0xdf40_ffff, flags: 0x4_6200 };
    let mut bench = Bench::new(model, view);
    size_all_bars(&mut bench, &view.resources);
    assert_eq!(bench.read(0x30, 4), 0xdf40_0000);
    bench.write(0x30, 4, 0xffff_f800);
    assert_eq!(bench.read(0x30, 4), 0xffff_0000);
    assert_eq!(bench.write(0x30, 4, 0xdf40_0001), DROPPED, "a guest does not turn the ROM on");
    assert_eq!(bench.read(0x30, 4), 0xdf40_0000);
}

#[test]
fn case_31_a_64_bit_bar_of_more_than_4_gib_shows_its_size_in_the_upper_half() {
    let mut model = Model::nic();
    model.put(0x10, &[0x0c, 0, 0, 0, 0x40, 0, 0, 0]);
    let mut view = Model::nic_view();
    view.resources[0] = Resource { start: 0x40_0000_0000, end: 0x43_ffff_ffff, flags: 0x14_220c };
    let mut bench = Bench::new(model, view);
    size_all_bars(&mut bench, &view.resources);
    bench.write(0x10, 4, 0xffff_ffff);
    bench.write(0x14, 4, 0xffff_ffff);
    assert_eq!((bench.read(0x10, 4), bench.read(0x14, 4)), (0x0000_000c, 0xffff_fffc));
}

#[test]
fn case_32_a_function_with_enhanced_allocation_only_has_six_empty_bars() {
    let mut model = Model::nic();
    model.bytes[0x10..0x28].fill(0);
    let view = view_of(
        "0x843000000000 0x84303fffffff 0x100220;0x0 0x0 0x0;0x0 0x0 0x0;0x0 0x0 0x0;\
         0x843060000000 0x8430600fffff 0x100220;0x0 0x0 0x0;0x0 0x0 0x0",
    );
    model.put(0x04, &[0, 0]);
    let mut bench = Bench::new(model, view);
    for at in (0x10..0x28).step_by(4) {
        assert_eq!(bench.write(at, 4, 0xffff_ffff), Written::Done);
        assert_eq!(bench.read(at, 4), 0);
    }
    assert!(bench.hardware.log.is_empty());
    bench.write(0x04, 2, 0x0002);
    assert_eq!(bench.hardware.word(4), 0x0002, "its memory is real all the same");
}

#[test]
fn only_a_full_write_of_ones_sizes_a_bar() {
    let mut bench = Bench::nic();
    for at in 0x10..0x14 {
        bench.write(at, 1, 0xff);
    }
    assert_eq!(bench.read(0x10, 4), 0xfe00_0004);
    bench.write(0x10, 2, 0xffff);
    bench.write(0x12, 2, 0xffff);
    assert_eq!(bench.read(0x10, 4), 0xfe00_0004);
    // The type bits do not count.
    bench.write(0x10, 4, 0xffff_fff0);
    assert_eq!(bench.read(0x10, 4), 0xffff_c004);
}

#[test]
fn a_bar_lost_in_the_device_is_restored_and_never_moved() {
    let mut bench = Bench::nic();
    bench.hardware.put(0x10, &[0x04, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bench.write(0x10, 4, 0xfd00_0004), DROPPED);
    assert!(bench.hardware.log.is_empty());
    assert_eq!(bench.write(0x10, 4, 0xfe00_0004), Written::Done);
    assert_eq!(bench.write(0x14, 4, 0x0000_0001), Written::Done);
    assert_eq!(bench.hardware.log, [(0x10, Width::Dword, 0xfe00_0004), (0x14, Width::Dword, 1)]);
    assert_eq!(bench.write(0x10, 4, 0xfe00_0004), Written::Done);
    assert_eq!(bench.hardware.log.len(), 2, "once is enough");
}

#[test]
fn a_list_that_does_not_fit_the_device_is_refused() {
    let refused = |change: &dyn Fn(&mut [Resource; 7])| {
        let mut model = Model::nic();
        let mut view = Model::nic_view();
        change(&mut view.resources);
        VirtualConfig::new(&model, None).expect("seized").attach(&mut model, view).expect_err("refused")
    };
    let moved = refused(&|list| list[0] = Resource { start: 0x1_fd00_0000, end: 0x1_fd00_3fff, ..list[0] });
    assert_eq!(moved, Refusal::Bar { index: 0, hardware: 0x1_fe00_0000, listed: 0x1_fd00_0000 });
    assert!(moved.to_string().contains("BAR 0"));
    let upper = refused(&|list| list[0] = Resource { start: 0xfe00_0000, end: 0xfe00_3fff, ..list[0] });
    assert!(matches!(upper, Refusal::Bar { index: 0, .. }));
    let narrow = refused(&|list| list[0].flags = 0x4_0200);
    assert!(matches!(narrow, Refusal::Resource { index: 0 } | Refusal::Bar { index: 0, .. }));
    let kind = refused(&|list| list[2].flags = 0x4_0200);
    assert!(matches!(kind, Refusal::Bar { index: 2, .. }));
    let absent = refused(&|list| list[2] = Resource::default());
    assert_eq!(absent, Refusal::Bar { index: 2, hardware: 0xe000, listed: 0 });
    let odd = refused(&|list| list[0].end -= 1);
    assert_eq!(odd, Refusal::Resource { index: 0 });
    let crooked = refused(&|list| list[0] = Resource { start: 0x1_fe00_1000, end: 0x1_fe00_4fff, ..list[0] });
    assert_eq!(crooked, Refusal::Resource { index: 0 });
    let huge = refused(&|list| list[0] = Resource { start: 0, end: u64::MAX, ..list[0] });
    assert_eq!(huge, Refusal::Resource { index: 0 });
    let last = refused(&|list| list[5] = Resource { start: 0x1000, end: 0x1fff, flags: 0x10_0200 });
    assert_eq!(last, Refusal::Resource { index: 5 });
}

#[test]
fn resources_without_an_address_and_shadowed_roms_read_zero() {
    let mut model = Model::nic();
    model.bytes[0x10..0x28].fill(0);
    model.put(0x04, &[0, 0]);
    let mut view = Model::nic_view();
    view.resources[0].flags |= 0x2000_0000;
    view.resources[2].flags |= 0x1000_0000;
    view.resources[6] = Resource { start: 0xc_0000, end: 0xd_ffff, flags: 0x212 };
    let mut bench = Bench::new(model, view);
    for at in [0x10, 0x14, 0x18, 0x30] {
        assert_eq!(bench.write(at, 4, 0xffff_ffff), Written::Done);
        assert_eq!(bench.read(at, 4), 0);
    }
}

#[test]
fn type_bits_that_differ_from_the_list_are_nothing_to_restore() {
    let mut model = Model::nic();
    model.put(0x10, &[0x0c]);
    let mut bench = Bench::new(model, Model::nic_view());
    assert_eq!(bench.read(0x10, 4), 0xfe00_0004);
    assert_eq!(bench.write(0x10, 4, 0xfe00_0004), Written::Done);
    assert!(bench.hardware.log.is_empty());
}

#[test]
fn what_is_no_resource_list_is_no_resource_list() {
    let good = "0x1 0x2 0x200;0x0 0x0 0x0;0x0 0x0 0x0;0x0 0x0 0x0;0x0 0x0 0x0;0x0 0x0 0x0;0x3 0xffffffffffffffff 0x0";
    let list = Resource::parse_list(good).expect("good");
    assert_eq!(list[0], Resource { start: 1, end: 2, flags: 0x200 });
    assert_eq!(list[6].end, u64::MAX);
    for bad in [
        "",
        "0x0 0x0 0x0",
        "0 0 0;0 0 0;0 0 0;0 0 0;0 0 0;0 0 0;0 0 0",
        &[good, ";"].concat(),
        &[good, ";0x0 0x0 0x0"].concat(),
        &good.replacen("0x1 ", "0x ", 1),
        &good.replacen("0x1 ", "0x+1 ", 1),
        &good.replacen("0x1 ", "0x1  ", 1),
        &good.replacen("0x1 ", "0x11112222333344445 ", 1),
        &good.replacen("0x200", "0x200 0x1", 1),
        &good.replacen(" 0x200", "", 1),
    ] {
        assert_eq!(Resource::parse_list(bad), None, "{bad}");
    }
}

#[test]
fn only_an_ordinary_device_that_answers_is_taken() {
    let mut model = Model::nic();
    model.put(0, &[0xff, 0xff]);
    assert_eq!(VirtualConfig::new(&model, None).expect_err("refused"), Refusal::Nameless);
    model.bytes.fill(0xff);
    for given in [None, Some((0x8086, 0x1521))] {
        assert_eq!(VirtualConfig::new(&model, given).expect_err("refused"), Refusal::NoAnswer);
    }
    let mut model = Model::nic();
    model.put(0x0e, &[0x81]);
    assert_eq!(VirtualConfig::new(&model, None).expect_err("refused"), Refusal::HeaderType(1));
    for refusal in
        [Refusal::NoAnswer, Refusal::Nameless, Refusal::HeaderType(1), Refusal::HeaderType(2), Refusal::Replaced]
    {
        assert!(refusal.to_string().contains(':'), "what is wrong: what to do");
    }
}

#[test]
fn a_device_gone_or_replaced_since_start_is_refused() {
    let mut model = Model::nic();
    let mut config = VirtualConfig::new(&model, None).expect("seized");
    assert_eq!(config.identity().ids(), (0x8086, 0x1521));
    model.put(2, &[0x22]);
    assert_eq!(config.attach(&mut model, Model::nic_view()), Err(Refusal::Replaced));
    model.bytes.fill(0xff);
    assert_eq!(config.attach(&mut model, Model::nic_view()), Err(Refusal::NoAnswer));
    assert_eq!(config.read(&model, 0, 4), Err(WireError::DeviceNotFound));
}

#[test]
fn a_device_that_vanishes_reads_as_ones_everywhere_and_takes_nothing() {
    let mut bench = Bench::nic();
    bench.hardware.bytes.fill(0xff);
    bench.hardware.writable_bits.fill(0);
    for offset in (0..0x1000).step_by(4) {
        assert_eq!(bench.read(offset, 4), 0xffff_ffff, "{offset:#x}");
        assert_eq!(bench.read(offset, 1), 0xff, "{offset:#x}");
    }
    for offset in (0..0x1000).step_by(4) {
        bench.write(offset, 4, 0x5555_5555);
    }
    bench.hardware.log.clear();
    bench.config.detach(&mut bench.hardware);
    assert!(bench.hardware.log.is_empty(), "nothing is there to be turned off");
}

#[test]
fn reference_item_3_nothing_is_left_for_the_next_guest() {
    let mut bench = Bench::permissive_nic();
    bench.write(0x04, 2, 0x0547);
    bench.write(0x10, 4, 0xffff_ffff);
    bench.write(0x30, 4, 0xffff_ffff);
    assert_eq!(bench.write(0x08, 4, 0), DROPPED);
    assert_eq!(bench.write(MSI + 2, 2, 0x0081), DENIED);
    bench.config.set_multifunction(true);
    bench.config.detach(&mut bench.hardware);
    assert_eq!(bench.config.pirq(), 0);
    assert_eq!(bench.config.write(&mut bench.hardware, 4, 2, 7), Err(WireError::DeviceNotFound));
    assert_eq!(bench.hardware.word(4), 0x0403, "bus mastering and the line interrupt off, decoding on");

    bench.config.attach(&mut bench.hardware, Model::nic_view()).expect("attached");
    assert_eq!(bench.read(0x04, 2), 0);
    assert_eq!(bench.read(0x10, 4), 0xfe00_0004);
    assert_eq!(bench.read(0x30, 4), 0);
    assert_eq!(bench.read(0x0e, 1), 0);
    assert_eq!(bench.write(0x08, 4, 0), DROPPED);
    assert_eq!(bench.write(MSI + 2, 2, 0x0081), DENIED);
    assert_eq!(bench.write(0xe0, 2, 0x1234), Written::Dropped { first: false });
}

#[test]
fn reference_item_10_every_write_to_a_read_only_register_stays_out_of_the_device() {
    for mut bench in [Bench::nic(), Bench::permissive_nic()] {
        let closed: Vec<Register> = bench
            .config
            .registers()
            .filter(|register| matches!(register.rule, Rule::ReadOnly | Rule::Ignored))
            .copied()
            .collect();
        for register in closed {
            for at in register.offset..register.end() {
                for value in [0x00, 0x5a, 0xff] {
                    assert_eq!(bench.write(at, 1, value).answer(), Ok(()), "{register:?}");
                }
            }
            assert!(bench.hardware.log.is_empty(), "{register:?}");
        }
    }
}

#[test]
fn the_header_shows_the_guests_slot_and_pirq() {
    let mut bench = Bench::nic();
    assert_eq!(bench.config.pirq(), 17);
    assert_eq!(bench.read(0x3c, 2), 0x0111);
    assert_eq!(bench.read(0x0e, 1), 0x00, "the host's multifunction bit does not show");
    bench.config.set_multifunction(true);
    assert_eq!(bench.read(0x0c, 4), 0x8080_2010);
}

#[test]
fn cache_line_size_goes_to_the_device_and_latency_does_not() {
    let mut bench = Bench::nic();
    assert_eq!(bench.write(0x0c, 2, 0xff08), Written::Done);
    assert_eq!(bench.hardware.log, [(0x0c, Width::Byte, 0x08)]);
    assert_eq!(bench.read(0x0c, 2), 0x2008);
}

#[test]
fn bist_can_be_started_and_nothing_else() {
    let mut bench = Bench::nic();
    assert_eq!(bench.write(0x0f, 1, 0x8f), DROPPED);
    assert_eq!(bench.write(0x0f, 1, 0x80), Written::Done);
    assert!(bench.hardware.log.is_empty());
    assert_eq!(bench.write(0x0f, 1, 0xc0), Written::Done);
    assert_eq!(bench.hardware.log, [(0x0f, Width::Byte, 0xc0)]);
    assert_eq!(bench.write(0x0f, 1, 0x40), Written::Done);
}

#[test]
fn wake_events_are_off_from_the_start_and_never_on() {
    let mut hardware = Model::nic();
    hardware.bytes[usize::from(PM) + 5] = 0x81;
    let mut config = VirtualConfig::new(&hardware, None).expect("seized");
    config.attach(&mut hardware, Model::nic_view()).expect("attached");
    assert_eq!(hardware.word(PM + 4), 0x8000, "the pending event is not cleared unasked");
    let mut bench = Bench { hardware, config };
    assert_eq!(bench.read(PM + 2, 2), 0x0023, "no state offers wake events");
    bench.write(PM + 4, 2, 0x0103);
    assert_eq!(bench.hardware.word(PM + 4), 0x8003);
    bench.write(PM + 4, 1, 0x00);
    assert_eq!(bench.hardware.word(PM + 4), 0x8000);
    bench.write(PM + 4, 2, 0x9e00);
    assert_eq!(bench.hardware.word(PM + 4), 0x1e00, "asked for, it is cleared");
    bench.write(PM + 4, 4, 0xaaaa_00fc);
    assert_eq!(bench.hardware.word(PM + 4), 0x0000);
    assert_eq!(bench.hardware.word(PM + 6), 0x6655);
}

#[test]
fn vital_product_data_can_be_read_and_not_written() {
    let mut bench = Bench::permissive_nic();
    assert_eq!(bench.write(VPD + 2, 2, 0x0010), Written::Done);
    assert_eq!(bench.write(VPD + 2, 2, 0x0010), Written::Done);
    assert_eq!(bench.hardware.log.len(), 2, "the same address asks again");
    assert_eq!(bench.write(VPD + 2, 2, 0x8010), DENIED);
    assert_eq!(bench.write(VPD, 4, 0x8010_9003), Written::Denied { first: false });
    assert_eq!(bench.write(VPD + 3, 1, 0x80), Written::Denied { first: false });
    assert_eq!(bench.write(VPD + 4, 4, 0x1234_5678), DROPPED);
    assert_eq!(bench.hardware.log.len(), 2);
}

#[test]
fn status_bits_are_cleared_by_a_permissive_guest_only() {
    for (mut bench, left) in [(Bench::nic(), 0xf910), (Bench::permissive_nic(), 0x0010)] {
        bench.hardware.put(6, &[0x10, 0xf9]);
        bench.write(0x06, 2, 0xffff);
        assert_eq!(bench.hardware.word(6), left);
    }
}

#[test]
fn without_writes_bars_can_be_sized_and_decoding_that_is_on_turned_on() {
    let mut model = Model::nic();
    model.put(4, &[0x07, 0x00]);
    model.writes_on = false;
    let view = Model::nic_view();
    let mut bench = Bench::new(model, view);
    // What Linux does around the sizing of BARs: decoding off, later on again.
    assert_eq!(bench.write(0x04, 2, 0x0004), Written::Done);
    size_all_bars(&mut bench, &view.resources);
    assert_eq!(bench.write(0x04, 2, 0x0007), Written::Done);
    assert_eq!(bench.read(0x04, 2), 0x0007);
    assert_eq!(bench.write(0x04, 2, 0x0147), Written::Done);
    assert_eq!(bench.read(0x04, 2), 0x0147);
    // The line cannot be silenced, and no handler may believe that it has been.
    assert_eq!(bench.write(0x04, 2, 0x0547), DENIED);
    assert_eq!(bench.read(0x04, 2), 0x0147);
    bench.config.detach(&mut bench.hardware);
}

#[test]
fn without_writes_what_needs_the_device_is_denied_and_not_pretended() {
    let mut bench = Bench::writes_off();
    bench.hardware.put(4, &[0x00, 0x00]);
    assert_eq!(bench.write(0x04, 2, 0x0147), DENIED);
    assert_eq!(bench.read(0x04, 2), 0x0140, "neither decoding nor bus mastering is on");
    assert_eq!(bench.write(0x0c, 1, 0x20), Written::Denied { first: false });
    assert_eq!(bench.write(0x0c, 1, 0x10), Written::Done, "unchanged");
    assert_eq!(bench.write(PM + 4, 2, 3), Written::Denied { first: false });
    assert_eq!(bench.write(VPD + 2, 2, 0), Written::Denied { first: false });
    assert_eq!(bench.write(0xe0, 4, 0), DROPPED);
    bench.hardware.put(0x10, &[0x04, 0, 0, 0]);
    assert_eq!(bench.write(0x10, 4, 0xfe00_0004), Written::Denied { first: false });

    let mut bench = Bench::permissive_nic();
    bench.hardware.writes_on = false;
    assert_eq!(bench.write(0xe0, 4, 0), DENIED);
}

/// xorshift64*: enough for choosing accesses.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    fn access(&mut self) -> (u16, i32, u32) {
        let size = 1 << (self.next() % 3);
        let space = if self.next().is_multiple_of(4) { 0x1000 } else { 0x100 };
        let offset = (self.next() % space) as u16 & !(size as u16 - 1);
        let value = match self.next() % 4 {
            0 => 0,
            1 => u32::MAX,
            _ => self.next(),
        };
        (offset, size, value)
    }
}

#[test]
fn random_accesses_never_change_what_is_not_the_guests() {
    for seed in 1..=40 {
        let mut random = Random(seed);
        let permissive = seed % 2 == 0;
        let mut bench = if permissive { Bench::permissive_nic() } else { Bench::nic() };
        // Hardware in which every bit takes a write, except that it can have been lost.
        bench.hardware.writable_bits.fill(0xff);
        bench.hardware.clear_bits.fill(0);
        let start = bench.hardware.clone();
        let open = |register: &Register| match register.name {
            Name::CacheLine | Name::Bist | Name::PowerControl | Name::VpdAddress | Name::Command => true,
            _ => permissive && register.rule == Rule::Permissive,
        };
        let closed: Vec<Register> = bench.config.registers().filter(|register| !open(register)).copied().collect();
        for _ in 0..2000 {
            let (offset, size, value) = random.access();
            bench.write(offset, size, value);
            let seen = bench.read(offset, size);
            let bytes = (0..size as u16).fold(0, |sum, byte| sum | bench.read(offset + byte, 1) << (8 * byte));
            assert_eq!(seen, bytes, "{offset:#x} {size}");
            assert_eq!(bench.hardware.word(4) & 0x0003, 0x0003, "decoding stays on");
            assert_eq!(bench.hardware.word(4) & 0x0140, start.word(4) & 0x0140, "parity and SERR stay");
            assert_eq!(bench.hardware.word(VPD + 2) & 0x8000, 0);
            assert_eq!(bench.hardware.word(PM + 4) & 0x0100, 0);
        }
        for register in closed {
            let range = usize::from(register.offset)..usize::from(register.end());
            assert_eq!(bench.hardware.bytes[range.clone()], start.bytes[range], "seed {seed}: {register:?}");
        }
    }
}

/// A listing of `lspci -x`, `-xxx` or `-xxxx`: one model for each function with 64 bytes or more.
fn models(text: &str) -> Vec<Model> {
    let mut models: Vec<Model> = Vec::new();
    for line in text.lines() {
        let Some((at, bytes)) = line.split_once(": ") else { continue };
        let (Ok(at), true) = (u16::from_str_radix(at, 16), at.len() <= 3) else { continue };
        let bytes: Option<Vec<u8>> = bytes
            .split_whitespace()
            .map(|byte| u8::from_str_radix(byte, 16).ok().filter(|_| byte.len() == 2))
            .collect();
        let Some(bytes) = bytes.filter(|bytes| bytes.len() == 16) else { continue };
        if at == 0 {
            models.push(Model::empty());
        }
        if let Some(model) = models.last_mut() {
            model.put(at, &bytes);
        }
    }
    models
}

/// A list that fits the device's registers, with sizes made up: the largest each address allows, at
/// most 1 MiB.
fn made_up_resources(model: &Model) -> [Resource; 7] {
    let mut list = [Resource::default(); 7];
    let mut index = 0;
    while index < 7 {
        let at = bars::register_offset(index);
        let held = model.read(at, Width::Dword);
        let wide = index < 5 && held & 0x7 == 0x4;
        let io = index < 6 && held & 1 != 0;
        let mask = if index == 6 {
            0x7ff
        } else if io {
            0x3
        } else {
            0xf
        };
        let mut start = u64::from(held & !mask);
        if wide {
            start |= u64::from(model.read(at + 4, Width::Dword)) << 32;
        }
        if start != 0 {
            let flags = if io { 0x101 } else { 0x200 | if wide { 0x10_0004 } else { 0 } };
            let prefetch = if !io && index < 6 && held & 0x8 != 0 { 0x2008 } else { 0 };
            let size = 1u64 << start.trailing_zeros().min(if io { 8 } else { 20 });
            list[index] = Resource { start, end: start + size - 1, flags: flags | prefetch };
        }
        index += if wide { 2 } else { 1 };
    }
    list
}

#[test]
fn listings_of_real_devices_give_tables_and_their_bars_can_be_sized() {
    let Ok(folder) = std::env::var("PCIBACK_DUMPS") else {
        println!("skipped: set PCIBACK_DUMPS to a folder of lspci -xxx listings");
        return;
    };
    let mut functions = 0;
    for file in std::fs::read_dir(folder).expect("the folder of PCIBACK_DUMPS") {
        let path = file.expect("an entry").path();
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        for mut model in models(&text) {
            model.writes_on = false;
            let name: String = path.display().to_string();
            let mut config = match VirtualConfig::new(&model, None) {
                Ok(config) => config,
                Err(refusal) => {
                    println!("{name}: {refusal}");
                    continue;
                }
            };
            assert_covers_all(&config);
            let resources = made_up_resources(&model);
            let view = GuestView { pirq: 16, resources, permissive: false, multifunction: false };
            config.attach(&mut model, view).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
            size_all_bars(&mut Bench { hardware: model, config }, &resources);
            functions += 1;
        }
    }
    println!("{functions} functions");
}
