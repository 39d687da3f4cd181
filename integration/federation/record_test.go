// What is left of federation when a CA ends: the record of each change in its audit log,
// and the sequence below which nothing is taken.

package federation_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid/forge"
)

// adminActs are the details of the audit log that speak of td, with who acted.
func adminActs(t *testing.T, d *stage.Domain, td string) (acts []string) {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(d.CAData(), "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(log)); lines.Scan(); {
		var r struct{ Type, Actor, Detail string }
		if json.Unmarshal(lines.Bytes(), &r) == nil && r.Type == "admin" && strings.Contains(r.Detail, td) && !strings.HasPrefix(r.Detail, "begin to ") {
			acts = append(acts, r.Actor+": "+r.Detail)
		}
	}
	return acts
}

// Each change of a federated trust bundle, by an operator or by a fetch, is in the audit
// log with its sequence and digest (F-17); and a bundle that is older than the last one is
// refused also by a CA that was killed since (F-4).
func TestFederationIsOnTheRecordAndOutlivesTheCA(t *testing.T) {
	t.Parallel()
	d, s := stage.CAAlone(t, "", nil), startSPIRE(t)
	d.Merlon("federation", "follow", "spire.test", "--profile", "https_web", "--url", s.web, "--web-ca", s.files.CA)
	newer := s.Bundle()
	newer.AddX509Authority(forge.New(t, "spire.test").Cert)
	serve := func(sequence uint64) {
		answer := document(t, newer, sequence)
		s.spoil.Store(&answer)
	}
	serve(5)
	d.Merlon("federation", "refresh", "spire.test")
	before := healthOf(t, d, "spire.test")
	if before.Sequence != 5 || len(before.RootHashes) != 2 {
		t.Fatalf("sequence 5 is not taken: %+v", before)
	}

	d.CA.Kill()
	d.CA.Restart()
	stage.Eventually(t, "the CA is back", func() error { _, _, err := d.Try("federation", "list"); return err })
	newer = s.Bundle() // what was withdrawn would be trusted again
	for _, sequence := range []uint64{4, 1} {
		serve(sequence)
		_, stderr, err := d.Try("federation", "refresh", "spire.test")
		if h := healthOf(t, d, "spire.test"); err == nil || !strings.Contains(stderr, "sequence number") || h.In != "failing" || h.Sequence != 5 || !slices.Equal(h.RootHashes, before.RootHashes) {
			t.Errorf("sequence %d after a restart: %v, %s; %+v", sequence, err, stderr, h)
		}
	}
	serve(6)
	d.Merlon("federation", "refresh", "spire.test")
	if h := healthOf(t, d, "spire.test"); h.Sequence != 6 || len(h.RootHashes) != 1 {
		t.Errorf("sequence 6 after a restart: %+v", h)
	}
	d.Merlon("federation", "set", "spire.test", s.write(t), "--force")
	d.Merlon("federation", "remove", "spire.test")

	acts := adminActs(t, d, "spire.test")
	var digests []string
	for _, want := range []string{
		`^uid:\d+.*: follow the trust bundle of spire\.test at https://\S+ \(https_web\)$`,
		`^ca: fetched federated bundle of spire\.test: sequence 1, sha256 ([0-9a-f]{64})$`,
		`^ca: fetched federated bundle of spire\.test: sequence 5, sha256 ([0-9a-f]{64})$`,
		`^ca: fetched federated bundle of spire\.test: sequence 6, sha256 ([0-9a-f]{64})$`,
		`^uid:\d+.*: set federated bundle of spire\.test: sequence 1, sha256 ([0-9a-f]{64})$`,
		`^uid:\d+.*: remove federated bundle of spire\.test$`,
	} {
		i := slices.IndexFunc(acts, regexp.MustCompile(want).MatchString)
		if i < 0 {
			t.Fatal(errors.New("not on the record, in this order: " + want + "\n" + strings.Join(acts, "\n")))
		}
		if m := regexp.MustCompile(want).FindStringSubmatch(acts[i]); len(m) > 1 {
			digests = append(digests, m[1])
		}
		acts = acts[i+1:]
	}
	// Each digest is of what was taken: three bundles of these keys, and the first again.
	if digests[0] != digests[3] || digests[0] == digests[1] || digests[1] == digests[2] {
		t.Errorf("digests %q", digests)
	}
}
