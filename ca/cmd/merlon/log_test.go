// What the log commands say without a CA: serial numbers as people have them,
// and mistakes in the command line.

package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestSerialNumbersAreReadAsPeopleHaveThem(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := new(big.Int).SetBytes(rapid.SliceOfN(rapid.Byte(), 1, 20).Draw(t, "number"))
		n.SetBit(n, rapid.IntRange(0, 150).Draw(t, "bit"), 1)
		want := n.Text(16)
		digits := strings.Repeat("0", rapid.IntRange(0, 3).Draw(t, "zeros")) + want
		if rapid.Bool().Draw(t, "upper") {
			digits = strings.ToUpper(digits)
		}
		switch rapid.IntRange(0, 2).Draw(t, "form") {
		case 1:
			digits = "0x" + digits
		case 2:
			if len(digits)%2 > 0 {
				digits = "0" + digits
			}
			var pairs []string
			for i := 0; i < len(digits); i += 2 {
				pairs = append(pairs, digits[i:i+2])
			}
			digits = strings.Join(pairs, ":")
		}
		if got, err := serialNumber(digits, ""); err != nil || got != want {
			t.Fatalf("%q is %q, %v; want %q", digits, got, err, want)
		}
	})
	for _, s := range []string{"", "0", "0x", "00:00", "zzz", "12g", "-1", "+1", "1_0", "0x0x1", "1 2", "0b1z"} {
		if got, err := serialNumber(s, "this way"); got != "" || !isUsage(err) {
			t.Errorf("%q is %q, %v; want a usage error", s, got, err)
		}
	}
}

func isUsage(err error) bool {
	_, ok := errors.AsType[usageError](err)
	return ok
}

// TestMistakesAboutTheLogAreUsageErrors: they never reach a CA, so none is
// taken for an answer of the log.
func TestMistakesAboutTheLogAreUsageErrors(t *testing.T) {
	for want, args := range map[string][]string{
		`"zzz" is no serial number`: {"log", "prove", "zzz"},
		`"zz" is no serial number`:  {"revoke", "--serial", "zz"},
		`--root-hash "zz" is no SH`: {"log", "verify", "--data-dir", t.TempDir(), "--root-hash", "zz"},
		`--root-hash is empty`:      {"log", "verify", "--data-dir", t.TempDir(), "--root-hash", ""},
		`--serial is empty`:         {"revoke", "--serial", ""},
	} {
		var out, stderr bytes.Buffer
		code := run(t.Context(), args, &out, &stderr)
		if code != exitUsage || !strings.Contains(stderr.String(), want) || !strings.Contains(stderr.String(), "hint: ") {
			t.Errorf("%q: exit code %d, %q; want %d, %q and a hint", args, code, stderr.String(), exitUsage, want)
		}
	}
}

// TestOnlyWhatCanBeTooOldIs: a forger writes the times that he likes.
func TestOnlyWhatCanBeTooOldIs(t *testing.T) {
	begin := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for name, test := range map[string]struct {
		issued, end time.Duration // from begin on
		want        bool
	}{
		"ended before":                  {-30 * time.Hour, -29 * time.Hour, true},
		"issued before, ends after":     {-time.Hour, 22 * time.Hour, true},
		"issued after":                  {time.Minute, time.Hour, false},
		"backdated, and good for long":  {-30 * time.Hour, 24 * time.Hour, false},
		"backdated, and good for years": {-30 * time.Hour, 10_000 * time.Hour, false},
	} {
		s := shown{issuedAt: begin.Add(test.issued), notAfter: begin.Add(test.end)}
		if got := s.before(begin); got != test.want {
			t.Errorf("%s: %v; want %v", name, got, test.want)
		}
	}
}

// TestUnreadableFilesHideNothing, neither other files nor what is before the
// damage in the same one.
func TestUnreadableFilesHideNothing(t *testing.T) {
	svid := svidPEM(t)
	dir := t.TempDir()
	var names []string
	for _, content := range [][]byte{
		svid, []byte("root:x:0:0:"), append(bytes.Clone(svid), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"...),
		bytes.Repeat([]byte{'x'}, maxSVIDFile+1), svid,
	} {
		name := filepath.Join(dir, string(rune('a'+len(names))))
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	names = append(names, filepath.Join(dir, "nowhere"), dir, "/dev/zero")
	svids, err := readShown(names)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range svids {
		if (s.Problem == "") != (s.Serial == "7") || (s.Problem == "") != (s.Result == "") {
			t.Errorf("%+v; want an SVID, or that it is unreadable and why", s)
		}
		got = append(got, filepath.Base(s.File)+":"+s.Serial)
	}
	if want := "a:7 b: c:7 c: d: e:7 nowhere: " + filepath.Base(dir) + ": zero:"; strings.Join(got, " ") != want {
		t.Errorf("read %q; want %q", got, want)
	}
	var out, stderr bytes.Buffer
	if code := run(t.Context(), []string{"log", "audit", names[1], "/nowhere"}, &out, &stderr); code != exitFailure ||
		strings.Count(out.String(), unreadable) != 2 || !strings.Contains(stderr.String(), "/nowhere: ") || !strings.Contains(stderr.String(), "hint: ") {
		t.Errorf("exit code %d, %q, %q; want %d, two rows, reasons and a hint", code, out.String(), stderr.String(), exitFailure)
	}
}

func svidPEM(t *testing.T) []byte {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{{Scheme: "spiffe", Host: "shop.test", Path: "/web"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
