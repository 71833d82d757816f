//! Wrong words on the driver domain's command line are reported with their text and position; the right ones still work.

use crate::check;
use crate::dom0::{DRIVER, NVME, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.must(&format!("xl destroy {DRIVER}; cp /tmp/{DRIVER}.cfg /tmp/good.cfg"))?;
    let wrong = ["bogus=1", "dev=0000:zz:00.0", "log=loud"];
    let words = wrong.join(" ");
    rig.must(&format!("sed -i 's/^extra *= *\"/&{words} /' /tmp/{DRIVER}.cfg && grep -q bogus /tmp/{DRIVER}.cfg"))?;
    let started = rig.start_driver();
    let log = rig.driver_log()?;
    let complaints = rig.published("complaints")?;
    let device = rig.wait_device(NVME, "ready");
    rig.run(&format!("xl destroy {DRIVER}; cp /tmp/good.cfg /tmp/{DRIVER}.cfg"))?;
    started?;
    device?;
    check!(complaints == "3", "three wrong words, but complaints={complaints:?}");
    let mut position = 0;
    for word in wrong {
        let text = word.split('=').next_back().unwrap_or(word);
        let found = log.lines().find(|line| line.contains(text)).unwrap_or_default();
        check!(!found.is_empty(), "no line of the log mentions {word}:\n{log}");
        let numbers: Vec<&str> = found.split(|c: char| !c.is_ascii_digit()).collect();
        let inside = position..=position + word.len();
        check!(
            numbers.iter().filter_map(|n| n.parse().ok()).any(|n: usize| inside.contains(&n)),
            "the complaint about {word} does not say that it is at byte {position}: {found}"
        );
        position += word.len() + 1;
    }
    Ok(())
}
