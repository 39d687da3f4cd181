package faults_test

// The harness itself: for each invariant there is a build that is broken on purpose,
// and the invariant must say so. Without this a check that never fails would pass.

import (
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/invariant"
	"merlon.dev/integration/stage"
)

// brokenEnv chooses which of its mistakes a broken build makes, so that few builds do.
const brokenEnv = "MERLON_BROKEN"

func broken(name string) string { return `os.Getenv("` + brokenEnv + `") == "` + name + `"` }

// brokenCA acknowledges what is not written yet (I1), signs for entries of other
// nodes (I2), writes no issuance down (I5), leaves a goroutine behind with each (I6),
// starts slowly (I7), and syncs neither its log nor its head (sync).
func brokenCA(t *testing.T) string {
	return stage.Changed(t, "merlon-ca-broken", "ca/cmd/merlon-ca",
		stage.Change{
			File: "ca/internal/api/admin.go", Old: "\tres, err := s.opts.Store.Txn(ctx, append(granted, store.Cmp{Key: key}), append(ends, store.Put(key, value)), nil)\n\tif err != nil {\n\t\treturn nil, fmt.Errorf(\"store a registration entry",
			New: "\tif " + broken("I1") + " && strings.Contains(e.SPIFFEID.Path(), \"writer\") {\n" +
				"\t\tgo func() {\n\t\t\ttime.Sleep(100 * time.Millisecond)\n\t\t\ts.opts.Store.Txn(context.Background(), nil, []store.Op{store.Put(key, value)}, nil)\n\t\t}()\n" +
				"\t\treturn &capb.CreateEntryResponse{Entry: s.entryForAdmin(e)}, s.done(ctx, audit.Record{Detail: \"create entry\", EntryID: e.ID, SPIFFEID: e.SPIFFEID.String()})\n\t}\n" +
				"\tres, err := s.opts.Store.Txn(ctx, append(granted, store.Cmp{Key: key}), append(ends, store.Put(key, value)), nil)\n\tif err != nil {\n\t\treturn nil, fmt.Errorf(\"store a registration entry",
		},
		stage.Change{File: "ca/internal/api/admin.go", Old: "import (\n", New: "import (\n\t\"os\"\n\t\"strings\"\n"},
		stage.Change{
			File: "ca/internal/api/node.go", Old: "\tcase !g.Concerns(e, now):\n",
			New: "\tcase " + broken("I2") + ":\n\t\treturn nil\n\tcase !g.Concerns(e, now):\n",
		},
		stage.Change{
			File: "ca/internal/api/node.go", Old: "\tbatch := signing{service",
			New: "\tif " + broken("I6") + " {\n\t\tgo func() { select {} }()\n\t}\n\tbatch := signing{service",
		},
		stage.Change{File: "ca/internal/api/node.go", Old: "import (\n", New: "import (\n\t\"os\"\n"},
		stage.Change{
			File: "ca/internal/api/service.go", Old: "\treturn s.write(ctx, s.opts.Audit.Issue, records)\n",
			New: "\tif " + broken("I5") + " {\n\t\treturn nil\n\t}\n\treturn s.write(ctx, s.opts.Audit.Issue, records)\n",
		},
		stage.Change{File: "ca/internal/api/service.go", Old: "import (\n", New: "import (\n\t\"os\"\n"},
		stage.Change{
			File: "ca/cmd/merlon-ca/main.go", Old: "\treturn ca.Main",
			New: "\tif " + broken("I7") + " {\n\t\ttime.Sleep(12 * time.Second)\n\t}\n\treturn ca.Main",
		},
		stage.Change{File: "ca/cmd/merlon-ca/main.go", Old: "import (\n", New: "import (\n\t\"time\"\n"},
		stage.Change{File: "ca/internal/store/badger/badger.go", Old: "WithSyncWrites(true)", New: "WithSyncWrites(!(" + broken("sync") + "))"},
		stage.Change{File: "ca/internal/store/badger/badger.go", Old: "import (\n", New: "import (\n\t\"os\"\n"},
		stage.Change{
			File: "ca/internal/store/badger/head.go", Old: "\tif err := h.sync(); err != nil {",
			New: "\tif " + broken("sync") + " {\n\t\treturn nil\n\t}\n\tif err := h.sync(); err != nil {",
		},
	)
}

// brokenPeer takes one revocation for everybody's (I3), or none for anybody's (I4).
func brokenPeer(t *testing.T) string {
	return stage.Changed(t, "peer-broken", "integration/faults/peer",
		stage.Change{
			File: "sdk/svid/revocation.go", Old: "\tif r == nil || len(r.layers) == 0 {\n\t\treturn Revocation{}, false\n\t}\n\tid := d.id.String()",
			New: "\tif r == nil || len(r.layers) == 0 || " + broken("I4") + " {\n\t\treturn Revocation{}, false\n\t}\n\tif " + broken("I3") + " {\n\t\treturn r.layers[0].records[0], true\n\t}\n\tid := d.id.String()",
		},
		stage.Change{File: "sdk/svid/revocation.go", Old: "import (\n", New: "import (\n\t\"os\"\n"},
	)
}

// until waits for at most 45 s; what is missing then is for the invariant to say.
func until(t *testing.T, what string, check func() bool) {
	t.Helper()
	for deadline := time.Now().Add(45 * time.Second); !check(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Logf("%s: not within 45 s", what)
			return
		}
	}
}

func TestBrokenBuildsAreCaught(t *testing.T) {
	for _, i := range invariant.All {
		t.Run(i.Name, func(t *testing.T) {
			t.Parallel()
			setup := faults.Setup{Env: []string{brokenEnv + "=" + i.Name}}
			switch i.Name {
			case "I3", "I4":
				setup.Peer = brokenPeer(t)
			default:
				setup.CA = brokenCA(t)
			}
			w := faults.New(t, setup)
			w.Peers()
			w.Work(4)
			w.Deny()
			until(t, "clients have done something", func() bool {
				n := w.Snapshot().Count()
				return n["create ok"] > 30 && n["read ok"] > 5 && n["sign ok"]+n["sign failed"] > 25
			})
			switch i.Name {
			// Bounds that only what is broken misses, on a busy machine too.
			case "I1":
				w.Kill("SIGKILL of the CA", 30*time.Second)
			case "I7":
				w.Kill("SIGKILL of the CA", 10*time.Second)
			case "I3", "I4": // the denial has to get there first
				until(t, "it shows", func() bool { return len(i.Check(w.Snapshot())) > 0 })
			}
			found := invariant.Check(w.Finish())
			if len(found[i.Name]) == 0 {
				t.Fatalf("nobody noticed; reports: %v", found)
			}
			for name, others := range found {
				if name != i.Name {
					t.Errorf("%s is blamed, too: %s", name, others[0])
				}
			}
			t.Logf("caught, with %d reports: %s", len(found[i.Name]), found[i.Name][0])
		})
	}
}

// TestLossOfPowerFindsLostSyncs: only a disk that forgets shows that a CA does not sync.
// Where of its files more is left of the head than of the log, the CA notices itself.
func TestLossOfPowerFindsLostSyncs(t *testing.T) {
	needsRoot(t)
	t.Parallel()
	disk := stage.NewLossyDisk(t)
	w := faults.New(t, faults.Setup{CA: brokenCA(t), Env: []string{brokenEnv + "=sync"}, Disk: disk.Path})
	disk.Sync()
	w.Peers()
	w.Work(4)
	until(t, "clients have done something", func() bool {
		n := w.Snapshot().Count()
		return n["create ok"] > 30 && n["sign ok"] > 5
	})
	t.Log(disk.Cut())
	w.CA.Kill()
	disk.Mount()
	w.CA.Restart()
	refused := false
	until(t, "the CA is ready, or says what is missing", func() bool {
		refused = strings.Contains(w.CA.Log(), "is damaged: revision")
		return refused || w.CAReady() == nil
	})
	if refused {
		t.Log("caught by the CA, which did not start")
		return
	}
	found := invariant.Check(w.Finish())["I1"]
	if len(found) == 0 {
		t.Fatal("nobody noticed")
	}
	t.Logf("caught, with %d reports: %s", len(found), found[0])
}
