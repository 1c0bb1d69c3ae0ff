// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"crypto/sha256"
	"encoding/hex"
)

// DatapathDigest and SockDigest tell one build of an object from another: the first half of the
// SHA-256 of its bytes, in hexadecimal.
func DatapathDigest() string { return digest(_DatapathBytes) }

// SockDigest is DatapathDigest of the other object.
func SockDigest() string { return digest(_SockBytes) }

// StrictDigest is DatapathDigest of the object of strict mode.
func StrictDigest() string { return digest(_StrictBytes) }

// ShieldDigest is DatapathDigest of the shield's object.
func ShieldDigest() string { return digest(_ShieldBytes) }

func digest(object []byte) string {
	sum := sha256.Sum256(object)
	return hex.EncodeToString(sum[:16])
}
