// Which KMS can be asked for, and what is said where there is none.

package upstream

import (
	"errors"
	"strings"
	"testing"

	kmsapi "go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"
)

func TestKMSSettings(t *testing.T) {
	for name, tt := range map[string]struct {
		cfg  KMSConfig
		want string // empty: valid
	}{
		"none":           {KMSConfig{}, ""},
		"token":          {KMSConfig{URI: "pkcs11:token=merlon?pin-source=/etc/merlon/pin"}, ""},
		"aws":            {KMSConfig{URI: "awskms:region=eu-west-1"}, ""},
		"google":         {KMSConfig{URI: "cloudkms:projects/p/locations/l/keyRings/r", Keys: []string{"root", "jwt"}}, ""},
		"azure":          {KMSConfig{URI: "azurekms:vault=v"}, ""},
		"PIN in it":      {KMSConfig{URI: "pkcs11:token=merlon?pin-value=1234"}, "pin-source=FILE"},
		"no URI":         {KMSConfig{URI: "merlon"}, "kms: is not a URI"},
		"unknown":        {KMSConfig{URI: "tpmkms:"}, `kms: "tpmkms" is none of`},
		"unknown key":    {KMSConfig{URI: "awskms:", Keys: []string{"anchor"}}, `kms_keys: "anchor"`},
		"key of the log": {KMSConfig{URI: "awskms:", Keys: []string{"log"}}, `kms_keys: "log"`},
		"keys, no KMS":   {KMSConfig{Keys: []string{"root"}}, "kms_keys: are given, but no kms"},
		"broken escape":  {KMSConfig{URI: "pkcs11:token=%zz?pin-value=1234"}, "kms: is not a URI"},
	} {
		err := tt.cfg.Validate()
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Validate = %v; want %q", name, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "1234") {
			t.Errorf("%s: the error holds the PIN: %v", name, err)
		}
	}
}

// A CA that cannot speak to the KMS says how to build one that can.
func TestKMSThatIsNotBuiltIn(t *testing.T) {
	for typ, command := range kmsBuild {
		if _, ok := kmsapi.LoadKeyManagerNewFunc(typ); ok {
			continue // by its build tag
		}
		cfg := config(t)
		cfg.KMS.URI = string(typ) + ":token=merlon"
		_, err := Open(t.Context(), cfg)
		if !errors.Is(err, ErrKMSNotBuilt) || !strings.Contains(err.Error(), command) {
			t.Errorf("%s: Open = %v; want %q", typ, err, command)
		}
	}
}

// The names of keys in each KMS, as its URIs want them.
func TestKMSKeyNames(t *testing.T) {
	for given, want := range map[string]string{
		"pkcs11:token=merlon":                        "pkcs11:id=X;object=merlon-root-X",
		"awskms:region=eu":                           "merlon-root-X",
		"cloudkms:projects/p/locations/l/keyRings/r": "cloudkms:projects/p/locations/l/keyRings/r/cryptoKeys/merlon-root-X",
		"azurekms:vault=v":                           "azurekms:name=merlon-root-X;vault=v",
	} {
		parsed, err := uri.Parse(given)
		if err != nil {
			t.Fatal(err)
		}
		o := &outside{uri: parsed}
		name, err := o.name(kindRoot)
		if err != nil {
			t.Fatal(err)
		}
		id := name[strings.LastIndex(name, "merlon-root-")+len("merlon-root-"):]
		id, _, _ = strings.Cut(id, ";")
		if got := strings.ReplaceAll(name, id, "X"); got != want || len(id) != 32 {
			t.Errorf("name in %s = %s; want %s", given, got, want)
		}
	}
}
