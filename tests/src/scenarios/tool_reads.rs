//! What dom0's tool only reads: `list` says who has what while it changes, `check` accepts the file that `config` wrote and
//! finds what is wrong in a damaged one. Neither changes anything.

use crate::check;
use crate::dom0::{DRIVER, Guest, NIC, NVME, Outcome, Rig, Stop};

/// What `list --json` says of a function: the text of its object, without blanks.
fn listed(rig: &mut Rig, bdf: &str) -> Outcome<String> {
    let json: String = rig.must("xl-pciback list --json")?.split_whitespace().collect();
    let found = json.split('{').find(|object| object.contains(&format!("\"function\":\"{bdf}\"")));
    found.map(str::to_owned).ok_or_else(|| Stop::Failure(format!("`xl-pciback list --json` has no {bdf}: {json}")))
}

fn says(rig: &mut Rig, bdf: &str, words: &[&str]) -> Outcome {
    let object = listed(rig, bdf)?;
    for word in words {
        check!(object.contains(word), "`xl-pciback list --json` does not say {word} of {bdf}: {object}");
    }
    Ok(())
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.note_store()?;
    for bdf in [NVME, NIC] {
        says(rig, bdf, &["\"state\":\"ready\"", "\"guest\":null", &format!("\"mode\":\"{}\"", rig.boot.mode())])?;
    }
    let assignable = rig.must("xl-pciback assignable-list")?;
    check!([NVME, NIC].iter().all(|bdf| assignable.contains(bdf)), "`assignable-list` lacks one of ours: {assignable}");

    rig.must(&format!("xl-pciback check /tmp/{DRIVER}.cfg"))?;
    for (from, to, word) in [
        ("id=1b36:0010", "id=1b36:0011", "1b36:0011"),
        ("b0100,1", "b0101,1", "b0100"),
        ("extra *= *\"", "extra = \"mode=fast ", "mode=fast"),
    ] {
        let (code, said) =
            rig.exec(&format!("sed 's/{from}/{to}/' /tmp/{DRIVER}.cfg > /tmp/bad.cfg; xl-pciback check /tmp/bad.cfg"))?;
        check!(code == 3 && said.contains(word), "`check` of a file with {to} ended with {code}: {said}");
    }
    let changed = rig.changed()?;
    check!(changed.is_empty(), "`list` and `check` changed xenstore:\n{changed}");

    let domid = rig.create(Guest::named("g1"))?;
    rig.attach("g1", NVME)?;
    says(rig, NVME, &["\"state\":\"in-use\"", "\"guest\":\"g1\"", &format!("\"guest_domid\":{domid}")])?;
    says(rig, NIC, &["\"state\":\"ready\"", "\"guest\":null"])?;
    let table = rig.must("xl-pciback list")?;
    check!(
        table.lines().any(|line| line.contains(NVME) && line.contains("in-use") && line.contains("g1")),
        "`xl-pciback list` does not show who has {NVME}:\n{table}"
    );
    rig.must("xl destroy g1")?;
    rig.wait_device(NVME, "ready")?;
    says(rig, NVME, &["\"state\":\"ready\"", "\"guest\":null"])
}
