// Keys that are made and used in a key management service and never leave it: a
// PKCS #11 token, or that of a cloud. Their folder holds key.uri, their name there.
// What speaks to each service is linked in by a build tag; go.step.sm/crypto/kms
// finds it by the scheme of the URI.

package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"go.step.sm/crypto/kms"
	kmsapi "go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"

	"merlon.dev/sdk/durable"
)

const uriFile = "key.uri"

// Errors of a KMS.
var (
	// ErrNoKMS is returned for a key in a KMS where none is configured.
	ErrNoKMS = errors.New("the key is in a KMS")
	// ErrKMSNotBuilt is returned for a KMS that this binary does not speak to.
	ErrKMSNotBuilt = errors.New("this merlon-ca was built without it")
)

// KMSConfig says which keys are made in which KMS.
type KMSConfig struct {
	// URI names the KMS, as in pkcs11:module-path=…;token=…?pin-source=FILE. Empty:
	// all keys are sealed files.
	URI string
	// Keys are the kinds made there: root, intermediate, jwt, policy. Empty: all in
	// a token; in a cloud the root alone, since each signature is a call there and
	// no key is ever removed.
	Keys []string
}

// kmsKinds can be made in a KMS. The key of the log is Ed25519, which few know.
var kmsKinds = []kind{kindRoot, kindIntermediate, kindJWT, kindPolicy}

// kmsBuild says how to build the CA for a KMS.
var kmsBuild = map[kmsapi.Type]string{
	kmsapi.PKCS11:    "CGO_ENABLED=1 go build -tags pkcs11 ./ca/cmd/merlon-ca",
	kmsapi.AmazonKMS: "go build -C ca/cmd/merlon-ca-full -tags awskms",
	kmsapi.CloudKMS:  "go build -C ca/cmd/merlon-ca-full -tags cloudkms",
	kmsapi.AzureKMS:  "go build -C ca/cmd/merlon-ca-full -tags azurekms",
}

// Validate says what is wrong with c.
func (c KMSConfig) Validate() error {
	if c.URI == "" {
		if len(c.Keys) > 0 {
			return errors.New("kms_keys: are given, but no kms")
		}
		return nil
	}
	u, err := uri.Parse(c.URI)
	if err != nil {
		return errors.New("kms: is not a URI, such as pkcs11:token=merlon?pin-source=/etc/merlon/pin") // the URI may hold a PIN
	}
	if _, ok := kmsBuild[kmsapi.Type(u.Scheme)]; !ok {
		return fmt.Errorf("kms: %q is none of pkcs11, awskms, cloudkms, azurekms", u.Scheme)
	}
	if u.Has("pin-value") {
		return errors.New("kms: holds the PIN itself, where it can be read: write it into a file of mode 0600 and name that with pin-source=FILE")
	}
	for _, name := range c.Keys {
		if !slices.Contains(kmsKinds, kind(name)) {
			return fmt.Errorf("kms_keys: %q is none of root, intermediate, jwt, policy", name)
		}
	}
	return nil
}

// outside is a KMS with the kinds of keys that are made there.
type outside struct {
	manager kmsapi.KeyManager
	uri     *uri.URI
	kinds   []kind
}

// openKMS opens the KMS of c; nil where there is none.
func openKMS(ctx context.Context, c KMSConfig) (*outside, error) {
	if err := c.Validate(); err != nil || c.URI == "" {
		return nil, err
	}
	u, err := uri.Parse(c.URI)
	if err != nil {
		return nil, err
	}
	typ := kmsapi.Type(u.Scheme)
	if _, ok := kmsapi.LoadKeyManagerNewFunc(typ); !ok {
		return nil, fmt.Errorf("open the KMS %s: %w: %s", typ, ErrKMSNotBuilt, kmsBuild[typ])
	}
	if pin := u.Get("pin-source"); pin != "" {
		if _, err := durable.ReadGuarded(strings.TrimPrefix(pin, "file:"), 0o600, maxSecret); err != nil {
			return nil, fmt.Errorf("open the KMS %s: read its PIN: %w", typ, err)
		}
	}
	o := &outside{uri: u, kinds: []kind{kindRoot}}
	if typ == kmsapi.PKCS11 {
		o.kinds = kmsKinds
	}
	if len(c.Keys) > 0 {
		o.kinds = nil
		for _, name := range c.Keys {
			o.kinds = append(o.kinds, kind(name))
		}
	}
	if o.manager, err = kms.New(ctx, kmsapi.Options{URI: c.URI}); err != nil {
		return nil, fmt.Errorf("open the KMS %s: %w", typ, err)
	}
	return o, nil
}

func (o *outside) makes(what kind) bool { return o != nil && slices.Contains(o.kinds, what) }

// create makes a key under a name that nothing else has.
func (o *outside) create(what kind, request *kmsapi.CreateKeyRequest) (madeKey, error) {
	name, err := o.name(what)
	if err != nil {
		return madeKey{}, err
	}
	request.Name = name
	made, err := o.manager.CreateKey(request)
	if err != nil {
		return madeKey{}, fmt.Errorf("make a %s key in the KMS: %w", what, err)
	}
	key := madeKey{uri: made.CreateSignerRequest.SigningKey}
	if key.signer, err = o.manager.CreateSigner(&made.CreateSignerRequest); err != nil {
		return madeKey{}, errors.Join(fmt.Errorf("use the %s key %s, just made in the KMS: %w", what, key.uri, err), o.remove(key.uri))
	}
	return key, nil
}

// name is how the KMS wants a key called.
func (o *outside) name(what kind) (string, error) {
	id, err := randomHex(16)
	if err != nil {
		return "", err
	}
	label := "merlon-" + string(what) + "-" + id
	switch kmsapi.Type(o.uri.Scheme) {
	case kmsapi.PKCS11:
		return "pkcs11:id=" + id + ";object=" + label, nil
	case kmsapi.CloudKMS: // the URI names the key ring
		return "cloudkms:" + strings.TrimSuffix(o.uri.Opaque, "/") + "/cryptoKeys/" + label, nil
	case kmsapi.AzureKMS:
		return uri.New("azurekms", url.Values{"name": {label}, "vault": {o.uri.Get("vault")}}).String(), nil
	default:
		return label, nil
	}
}

// remove removes a key where the KMS lets us; clouds do not.
func (o *outside) remove(name string) error {
	var err error
	switch m := o.manager.(type) {
	case interface{ DeleteKey(name string) error }: // PKCS #11
		err = m.DeleteKey(name)
	case kmsapi.KeyDeleter:
		err = m.DeleteKey(&kmsapi.DeleteKeyRequest{Name: name})
	}
	if err != nil {
		return fmt.Errorf("remove the key %s from the KMS: %w", name, err)
	}
	return nil
}

// load finds the key that a file names.
func (o *outside) load(name string) (madeKey, error) {
	if o == nil {
		return madeKey{}, fmt.Errorf("%w: %s", ErrNoKMS, name)
	}
	if !strings.HasPrefix(name, o.uri.Scheme+":") {
		return madeKey{}, fmt.Errorf("%w: %s, and the one that is configured is %s", ErrNoKMS, name, o.uri.Scheme)
	}
	signer, err := o.manager.CreateSigner(&kmsapi.CreateSignerRequest{SigningKey: name})
	if err != nil {
		return madeKey{}, fmt.Errorf("find the key %s in the KMS: %w", name, err)
	}
	return madeKey{signer: signer, uri: name}, nil
}

func (o *outside) close() error {
	if o == nil {
		return nil
	}
	return o.manager.Close()
}
