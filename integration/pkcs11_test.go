// A CA whose keys are in a PKCS #11 token: everything it issues is signed there.

package integration_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid"
)

func TestCAWithItsKeysInAToken(t *testing.T) {
	t.Parallel()
	util, err := exec.LookPath("softhsm2-util")
	if err != nil {
		t.Skip("SoftHSM is not installed: apt-get install softhsm2")
	}
	dir := stage.Dir(t)
	conf, pin, tokens := filepath.Join(dir, "softhsm2.conf"), filepath.Join(dir, "pin"), filepath.Join(dir, "tokens")
	err = errors.Join(os.Mkdir(tokens, 0o700), os.WriteFile(pin, []byte("1234"), 0o600),
		os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	env := []string{"SOFTHSM2_CONF=" + conf}
	initToken := exec.CommandContext(t.Context(), util, "--init-token", "--free", "--label", "merlon", "--so-pin", "4321", "--pin", "1234")
	initToken.Env = append(os.Environ(), env...)
	if out, err := initToken.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	kms := fmt.Sprintf("kms: pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=merlon?pin-source=%s", pin)
	d := stage.SeparateAs(t, stage.Build(t, "merlon-ca-pkcs11", "ca/cmd/merlon-ca", "pkcs11"), env, kms)
	d.Entry("/me", "--ttl", "4s")
	d.Merlon("policy", "push", "../examples/quickstart/policy")

	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, d); return err })
	seen := make(map[string]bool)
	stage.Eventually(t, "SVIDs are signed again and again", func() error {
		got, err := fetch(t, d)
		if err != nil {
			return err
		}
		bundles, err := workloadapi.FetchX509Bundles(t.Context(), workloadapi.WithAddr(d.WorkloadAPI))
		if err != nil {
			return err
		}
		if _, err := svid.VerifyChain(got.Certificates, bundles, time.Now()); err != nil {
			return err
		}
		if seen[got.Certificates[0].SerialNumber.String()] = true; len(seen) < 3 {
			return errors.New("too few of them")
		}
		return nil
	})
	token, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "orders"}, workloadapi.WithAddr(d.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := workloadapi.FetchJWTBundles(t.Context(), workloadapi.WithAddr(d.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(token.Marshal(), keys, []string{"orders"}); err != nil {
		t.Error(err)
	}
	if limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", d.CA.PID())); err != nil || !regexp.MustCompile(`Max core file size +0 +0`).Match(limits) {
		t.Errorf("a crash of the CA would leave its memory in a file (%v):\n%s", err, limits)
	}
	d.CA.Restart()
	stage.Eventually(t, "the CA is back with the same keys", func() error { _, _, err := d.Try("agent", "list"); return err })
	d.Entry("/again")
	inFiles, _ := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(d.Admin)), "ca-data", "keys", "*", "key.*"))
	for _, path := range inFiles {
		if !strings.HasSuffix(path, "key.uri") && !strings.Contains(path, "/log-1/") {
			t.Errorf("%s is not the name of a key in the token", path)
		}
	}
	if len(inFiles) != 5 {
		t.Errorf("files of keys: %v; want 4 and that of the log", inFiles)
	}

	// Without the tag the CA says how to build it.
	_, stderr, err := stage.Run(t.Context(), t, env, "merlon-ca", "-trust-domain", "a.test", "-data-dir", filepath.Join(dir, "data"),
		"-admin-socket", filepath.Join(dir, "s", "a.sock"), "-address", "127.0.0.1:0", "-https-address", "127.0.0.1:0", "-health-address", "127.0.0.1:0",
		"-kms", strings.TrimPrefix(kms, "kms: "))
	if err == nil || !strings.Contains(stderr, "built without it: CGO_ENABLED=1 go build -tags pkcs11 ./ca/cmd/merlon-ca") || !strings.Contains(stderr, "hint: ") {
		t.Errorf("without the tag: %v\n%s", err, stderr)
	}
}
