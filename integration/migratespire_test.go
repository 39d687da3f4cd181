// A workload of SPIRE's gets its SVID from Merlon, by the entries that SPIRE shows.

package integration_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"merlon.dev/integration/stage"
)

func TestWorkloadOfSPIREGetsItsSVID(t *testing.T) {
	d := stage.Dev(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var agents []struct {
		SPIFFEID string `json:"spiffe_id"`
	}
	stage.Decode(t, d.Merlon("agent", "list", "-o", "json"), &agents)
	node := d.ID("/spire/agent/x509pop/0beec7b5ea3f0fdbc95d0dd47f3c5bc275da8a33")
	shown := fmt.Sprintf(`{"entries": [{"id": "e1", "spiffe_id": {"trust_domain": %[1]q, "path": "/from-spire"},
  "parent_id": {"trust_domain": %[1]q, "path": "/spire/agent/x509pop/0beec7b5ea3f0fdbc95d0dd47f3c5bc275da8a33"},
  "selectors": [{"type": "unix", "value": "uid:%[2]d"}, {"type": "unix", "value": %[3]q}],
  "x509_svid_ttl": 600, "federates_with": [], "admin": false, "downstream": false, "expires_at": "0", "dns_names": ["web.shop.test"],
  "revision_number": "0", "store_svid": false, "jwt_svid_ttl": 0, "hint": "", "created_at": "1750000000"}], "next_page_token": ""}`,
		d.TrustDomain, os.Geteuid(), "path:"+exe)
	file := filepath.Join(t.TempDir(), "entries.json")
	if err := os.WriteFile(file, []byte(shown), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is there already
		d.Merlon("migrate", "spire", "--entries", file, "--apply", "--parent", node+"="+agents[0].SPIFFEID)
	}
	watchSVIDs(t, d).expect(t, d.ID("/from-spire"))
	var entries []struct {
		SPIFFEID string `json:"spiffe_id"`
	}
	stage.Decode(t, d.Merlon("entry", "list", "-o", "json"), &entries)
	if len(entries) != 1 {
		t.Errorf("entries = %+v; want one", entries)
	}
}
