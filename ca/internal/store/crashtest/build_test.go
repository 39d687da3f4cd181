package crashtest

// Builds of the child: as the sources are, and with one of them broken.

import (
	"testing"

	"merlon.dev/integration/stage"
)

const childPackage = "ca/internal/store/crashtest/child"

// plain is the child as it is, without the race detector, which has no business
// in a process that opens a hundred damaged stores.
func plain(t testing.TB) string {
	t.Helper()
	return stage.Path(t, stage.Build(t, "crash-child", childPackage, ""))
}

// broken is the child with changed sources.
func broken(t testing.TB, name string, changes ...change) string {
	t.Helper()
	var all []stage.Change
	for _, c := range changes {
		all = append(all, stage.Change{File: "ca/internal/store/" + c.file, Old: c.old, New: c.new})
	}
	return stage.Path(t, stage.Changed(t, "crash-child-"+name, childPackage, all...))
}
