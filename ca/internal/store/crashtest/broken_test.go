package crashtest

// The harness itself: builds that are broken on purpose are caught, each by the
// check that is there for it.

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// change breaks a source file below ca/internal/store: old, which must be in it
// once, becomes new.
type change struct{ file, old, new string }

// brokenBuilds are the mistakes that the harness is there to find.
var brokenBuilds = map[string]struct {
	changes []change
	// found runs the harness and returns what it reports.
	found func(t *testing.T, program string) []string
	// words are in what it reports, one of them at least.
	words []string
}{
	"acknowledges before anything is written": {
		[]change{{
			"badger/commit.go", "\tif err := s.write(b); err != nil {\n\t\ts.stopWrites",
			"\tcommitted{requests: done.requests}.answer(nil)\n\tdone.requests = nil\n\tif err := s.write(b); err != nil {\n\t\ts.stopWrites",
		}},
		killed,
		[]string{"LOST", "others had ended before it began"},
	},
	"does not sync Badger": {
		[]change{{"badger/badger.go", "WithSyncWrites(true)", "WithSyncWrites(false)"}},
		untimely,
		[]string{"without a sync of Badger's log"},
	},
	"does not sync the head": {
		[]change{{"badger/head.go", "\tif err := h.sync(); err != nil {", "\tif err := error(nil); err != nil {"}},
		untimely,
		[]string{"without a sync of HEAD"},
	},
	"goes on after a failed sync": {
		[]change{
			{"badger/commit.go", "\tif failed := s.failed.Load(); failed != nil {\n\t\treturn *failed\n\t}\n\treturn s.room()", "\treturn s.room()"},
			{"badger/publish.go", "failed := s.failed.Load()", "failed := (*error)(nil)"},
		},
		failing,
		[]string{"after a sync had failed"},
	},
	"skips the hash chain and the head": {
		[]change{{"badger/check.go", "\tf.walkLog(view)\n\tf.compareHead()\n", "\tf.walkLog(view)\n\tf.reason = \"\"\n"}},
		damaged,
		[]string{lost},
	},
}

func killed(t *testing.T, program string) []string {
	t.Helper()
	r := newRig(t, target{Dir: t.TempDir(), KeepRevisions: 6_000}, program, seed(t))
	r.expected = true
	return r.round(4)
}

func untimely(t *testing.T, program string) []string {
	t.Helper()
	needStrace(t)
	r, calls := runTraced(t, program, 0)
	return r.history.checkSyncs(calls, badgerNeeds)
}

func failing(t *testing.T, program string) (found []string) {
	t.Helper()
	needStrace(t)
	for _, n := range []int{12, 20} {
		r, calls := runTraced(t, program, n)
		found = append(found, r.history.checkSyncs(calls, badgerNeeds)...)
	}
	return found
}

func damaged(t *testing.T, program string) []string {
	t.Helper()
	img := images(t)[1]
	only := func(d damage) bool { return strings.HasSuffix(d.file, ".mem") && d.kind == truncated }
	return sweepImage(t, program, img, 4, only, rand.New(rand.NewPCG(1, 1))).broken
}

func TestBrokenBuildsAreCaught(t *testing.T) {
	t.Parallel()
	for name, b := range brokenBuilds {
		t.Run(name, func(t *testing.T) {
			found := b.found(t, broken(t, strings.ReplaceAll(name, " ", "-"), b.changes...))
			for _, word := range b.words {
				if i := slices.IndexFunc(found, func(what string) bool { return strings.Contains(what, word) }); i >= 0 {
					t.Logf("caught, with %d reports: %s", len(found), found[i])
					return
				}
			}
			t.Errorf("nobody noticed; reports: %v", found)
		})
	}
}
