"""Data sets: each turns its own layout into records; ``MedicalDataModule`` does the rest.

A data set outside this project needs no registration: name its class by its full path in the configuration.
"""

from datamodules.cbis_ddsm import CBISDDSMDataModule as CBISDDSMDataModule
from datamodules.cmmd import CMMDDataModule as CMMDDataModule
from datamodules.covid_chestxray import CovidChestXrayDataModule as CovidChestXrayDataModule
from datamodules.covid_qu_ex import CovidQuExDataModule as CovidQuExDataModule
from datamodules.image_folder import ImageFolderDataModule as ImageFolderDataModule
from datamodules.inbreast import INbreastDataModule as INbreastDataModule
from datamodules.kermany import KermanyDataModule as KermanyDataModule
from datamodules.labels_csv import LabelsCSVDataModule as LabelsCSVDataModule
from datamodules.medical import MedicalDataModule as MedicalDataModule
from datamodules.mini_mias import MiniMIASDataModule as MiniMIASDataModule
from datamodules.phantom import PhantomDataModule as PhantomDataModule
from datamodules.phantom_dicom import PhantomSite as PhantomSite
from datamodules.qata_cov19 import QaTaCov19DataModule as QaTaCov19DataModule
from datamodules.rsna_pneumonia import RSNAPneumoniaDataModule as RSNAPneumoniaDataModule
from datamodules.transforms import BreastPreset as BreastPreset
from datamodules.transforms import ChestPreset as ChestPreset
from datamodules.transforms import PlainPreset as PlainPreset
from datamodules.vindr_mammo import VinDrMammoDataModule as VinDrMammoDataModule
